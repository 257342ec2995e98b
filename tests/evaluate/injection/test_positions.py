"""Which target position takes which source state."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from evaluate.injection.positions import source_positions
from featstore.text.tokens import TokenizedWindow


def window(ends: list[int], special: list[bool] | None = None) -> TokenizedWindow:
    flags = np.array(special if special is not None else [False] * len(ends), dtype=bool)
    return TokenizedWindow(np.zeros(len(ends), np.int32), np.array(ends, np.int32), flags)


@st.composite
def windows(draw: st.DrawFn) -> TokenizedWindow:
    """Non-decreasing byte ends, some shared; special tokens anywhere, whose byte end is 0."""
    ends = sorted(draw(st.lists(st.integers(1, 20), max_size=15)))
    special = draw(st.lists(st.booleans(), min_size=len(ends), max_size=len(ends)))
    return window([0 if s else e for e, s in zip(ends, special, strict=True)], special)


def slow_positions(source: TokenizedWindow, target: TokenizedWindow) -> list[int]:
    readers = [s for s in range(len(source.ids)) if not source.special[s]]
    taken = []
    for t, end in enumerate(target.byte_end):
        sharing = [u for u in range(len(target.ids)) if not target.special[u] and target.byte_end[u] == end]
        there = [s for s in readers if source.byte_end[s] == end]
        if target.special[t]:
            taken.append(-1)
        elif len(there) == len(sharing):
            taken.append(there[sharing.index(t)])
        else:
            # Only the last of those that share an end has read up to it.
            read = [s for s in readers if source.byte_end[s] < end or (t == sharing[-1] and s in there)]
            taken.append(read[-1] if read else -1)
    return taken


@given(source=windows(), target=windows())
def test_positions_equal_the_slow_search(source: TokenizedWindow, target: TokenizedWindow) -> None:
    assert source_positions(source, target).tolist() == slow_positions(source, target)


@given(source=windows())
def test_a_window_takes_exactly_its_own_states(source: TokenizedWindow) -> None:
    own = np.where(source.special, -1, np.arange(len(source.ids)))
    np.testing.assert_array_equal(source_positions(source, source), own)


@given(source=windows(), target=windows())
def test_no_position_is_told_what_comes_after_it(source: TokenizedWindow, target: TokenizedWindow) -> None:
    taken = source_positions(source, target)
    ends = target.byte_end
    for position in np.flatnonzero(taken >= 0):
        assert source.byte_end[taken[position]] <= ends[position]
        later = [p for p in range(position + 1, len(ends)) if not target.special[p] and ends[p] == ends[position]]
        if later and source.byte_end[taken[position]] == ends[position]:
            # In the middle of a character: the source token must be in its middle, too.
            assert taken[position] < taken[later[0]]


def test_tokens_that_share_a_character_correspond_one_by_one_or_not_at_all() -> None:
    # A three-byte character after "a", as one, two and three tokens.
    one, two, three = window([1, 4, 5]), window([1, 4, 4, 5]), window([1, 4, 4, 4, 5])
    assert source_positions(three, three).tolist() == [0, 1, 2, 3, 4]
    assert source_positions(three, one).tolist() == [0, 3, 4]
    assert source_positions(one, three).tolist() == [0, 0, 0, 1, 2]
    assert source_positions(two, three).tolist() == [0, 0, 0, 2, 3]


def test_the_state_is_that_of_the_last_token_ending_at_or_before() -> None:
    # Source reads "ab|cde|f", target "a|bc|d|ef"; the target's first token ends before any source token does.
    assert source_positions(window([2, 5, 6]), window([1, 3, 4, 6])).tolist() == [-1, 0, 0, 2]


def test_no_source_token_means_every_target_token_keeps_its_own() -> None:
    assert source_positions(window([0], [True]), window([1, 2])).tolist() == [-1, -1]
    assert source_positions(window([]), window([1])).tolist() == [-1]
    assert source_positions(window([1]), window([])).tolist() == []
