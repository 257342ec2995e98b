"""Which prompts share a batch, and which tokens end an answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from featstore.models.answering import batches, stops_of
from featstore.models.layout import Batching, Continuing


def stream(*, padding: bool = True, switch: int | None = None) -> Any:
    return SimpleNamespace(continuing=Continuing(padding=padding), batching=Batching(switch=switch))


def lengths_of(found: list[list[int]], lengths: list[int]) -> list[list[int]]:
    assert sorted(place for batch in found for place in batch) == list(range(len(lengths)))
    return [[lengths[place] for place in batch] for batch in found]


def test_batches_hold_as_many_tokens_as_they_may_the_longest_first() -> None:
    lengths = [3, 30, 10, 3, 25, 200]
    assert lengths_of(batches(stream(), lengths, 10, 80), lengths) == [[200], [30, 25], [10, 3, 3]]
    assert len(batches(stream(), [1] * 200, 1, 10**9)) == 4
    assert batches(stream(), [], 10, 80) == []


def test_prompts_of_other_lengths_are_apart_where_padding_changes_them() -> None:
    lengths = [3, 5, 3, 5, 5]
    assert lengths_of(batches(stream(padding=False), lengths, 4, 1000), lengths) == [[5, 5, 5], [3, 3]]


def test_prompts_on_either_side_of_a_switch_are_apart() -> None:
    lengths = [40, 8, 60, 9]
    assert lengths_of(batches(stream(switch=20), lengths, 4, 1000), lengths) == [[60, 40], [9, 8]]


@pytest.mark.parametrize(
    ("named", "own", "wanted"), [(7, 2, {2, 7}), ([7, 8], 7, {7, 8}), (None, None, set()), (None, 2, {2})]
)
def test_what_ends_an_answer(named: Any, own: int | None, wanted: set[int]) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=named))
    assert stops_of(model, SimpleNamespace(eos_token_id=own)) == wanted
    assert stops_of(SimpleNamespace(), SimpleNamespace(eos_token_id=own)) == ({own} - {None})
