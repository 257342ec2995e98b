"""Arguments of functions: their plain types, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featstore.errors import SpecError
from featstore.runtime.arguments import (
    as_path,
    check_keywords,
    layers_text,
    nearest,
    several,
    shown,
    typed,
    whole,
)


@pytest.mark.parametrize(
    ("value", "kinds", "plain"),
    [
        (np.int64(3), "int", 3),
        (np.True_, "bool", True),
        (2, "float", 2.0),
        (np.float32(0.5), "float | None", 0.5),
        (None, "int | None", None),
        (Path("a"), "str", "a"),
    ],
)
def test_values_become_plain(value: Any, kinds: str, plain: Any) -> None:
    result = typed("x", value, kinds)
    assert result == plain
    assert type(result) is type(plain)


@pytest.mark.parametrize(
    ("value", "kinds"),
    [(True, "int"), (1, "bool"), ("1", "int"), (1.5, "int"), (None, "int"), (b"a", "str"), ([], "str")],
)
def test_values_of_other_types_are_refused(value: Any, kinds: str) -> None:
    with pytest.raises(SpecError) as caught:
        typed("x", value, kinds)
    assert str(caught.value) == f"x={value!r}: expected {kinds}"


@pytest.mark.parametrize("value", [-1, True, 1.0, "1", None])
def test_no_whole_number(value: Any) -> None:
    assert whole("x", np.int32(0), 0) == 0
    with pytest.raises(SpecError, match=r"^x .*: give a whole number, 0 or more$"):
        whole("x", value, 0)


def test_a_value_in_a_message_is_short_and_one_line() -> None:
    assert shown(np.zeros((2, 2))) == "array([[0., 0.], [0., 0.]])"
    assert len(shown("a" * 1000)) == 60
    assert shown("a" * 1000).endswith("…")


def test_places_and_several_values() -> None:
    assert as_path("out", "a/b") == Path("a/b")
    assert several("runs", (x for x in "ab"), "names") == ["a", "b"]
    for value in ("ab", b"ab", 3, None):
        with pytest.raises(SpecError, match=r"^runs .*: give names$"):
            several("runs", value, "names")


@pytest.mark.parametrize("layers", [b"2", {2: 1}, [], 2.0, [None], True])
def test_layers_are_numbers_or_depths(layers: Any) -> None:
    assert (layers_text([1, np.int64(2)]), layers_text(3), layers_text("50%"), layers_text(None)) == (
        "1,2",
        "3",
        "50%",
        None,
    )
    with pytest.raises(SpecError, match=r"^layers .*: write numbers such as"):
        layers_text(layers)


def test_an_unknown_keyword_gets_the_nearest() -> None:
    def function(place: str, *, layers: str, seed: int = 0) -> None: ...

    check_keywords(function, "f", {"layers": 1})
    with pytest.raises(TypeError, match=r"^f\(\) has no option 'layer'; did you mean 'layers'\?$"):
        check_keywords(function, "f", {"layer": 1})
    with pytest.raises(TypeError, match=r"^f\(\) has no option 'place'"):
        check_keywords(function, "f", {"place": 1})
    assert nearest("zzz", ["a", "b"]) == "; it has a, b"
