"""Roles as people name them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from featstore.errors import SpecError
from featstore.text.roles import ROLES, count_roles, of_roles, parse_roles, role_names, roles_text


@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        (None, None),
        ("all", None),
        ("assistant", (3,)),
        (" assistant , user,assistant", (2, 3)),
        (["generated", "text"], (0, 5)),
        (iter(("tool",)), (4,)),
        (",".join(ROLES), (0, 1, 2, 3, 4, 5)),
    ],
)
def test_roles_are_numbers_in_order(given: Any, numbers: tuple[int, ...] | None) -> None:
    assert parse_roles(given) == numbers


def test_however_they_are_typed_the_same_roles_are_one_text() -> None:
    for given in ("assistant,user", "user, assistant", ("assistant", "user", "user")):
        assert role_names(given) == ("user", "assistant")
        assert roles_text(given) == "user,assistant"
    for everything in (None, "all"):
        assert role_names(everything) is None
        assert roles_text(everything) is None


@pytest.mark.parametrize("given", ["narrator", "", " ", "assistant,", [], [3], 3, ["all", "user"], "Assistant"])
def test_what_is_no_role_is_refused_in_one_line(given: Any) -> None:
    with pytest.raises(SpecError) as caught:
        parse_roles(given)
    assert str(caught.value).endswith("choose among text, system, user, assistant, tool, generated, or all")
    assert str(caught.value).startswith("--roles ")
    assert "\n" not in str(caught.value)


def test_rows_are_counted_by_role() -> None:
    assert count_roles(np.array([3, 2, 3, 0], np.uint8)) == {"text": 1, "user": 1, "assistant": 2}
    assert count_roles(np.zeros(0, np.uint8)) == {}


def test_figures_say_of_whom_they_are() -> None:
    assert of_roles(None) == ""
    assert of_roles(("assistant",)) == " of the role assistant"
    assert of_roles(["user", "assistant"]) == " of the roles user, assistant"
