"""What `align cka` says of floors: nothing is decided by too few exchanges, and values stand beside their own floor."""

from __future__ import annotations

from typing import Any

from align.similarity.page.document import render
from align.similarity.words import describe, floor_lines
from tests.support.similarity_fixture import similarity_result


def _floors(draws: int) -> dict[str, Any]:
    result = similarity_result(2, 2)
    for floor in result["permutations"].values():
        floor["draws"] = draws
    return result


def test_too_few_exchanges_decide_nothing() -> None:
    few, enough = ("\n".join(floor_lines(_floors(draws))) for draws in (18, 19))
    assert few.count("nothing is decided") == 2
    assert "are above it" not in few
    assert enough.count("are above it") == 2
    assert "nothing is decided" not in enough


def test_the_page_says_so_too() -> None:
    few, enough = (render(_floors(draws)) for draws in (18, 19))
    assert "exchanges are too few to decide anything" in few
    assert "are above that floor" not in few
    assert "too few to decide" not in enough


def test_without_floors_the_reader_is_told_what_is_not_known() -> None:
    line = floor_lines(similarity_result(2, 2) | {"permutations": {}})[-1]
    assert line.startswith("no floors: what tokens, positions and documents in common give is not known")


def test_a_measure_stands_beside_its_floor_over_the_same_rows() -> None:
    result = similarity_result(2, 2, measures=("cka",))
    block = result["measures"]["cka"]
    for table, value in (("value", 0.4321), ("mean", 0.4106), ("p_max", 0.025)):
        block["permutations"]["token"][table] = [[value] * 2] * 2
    assert "0.432 / 0.411 (p 0.025)" in describe(result)
    assert "the value over the floor's own rows / mean of the exchanges" in describe(result)
