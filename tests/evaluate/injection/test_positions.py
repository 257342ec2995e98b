"""Which target position takes which source state."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from evaluate.injection.positions import source_positions
from featstore.text.tokens import TokenizedWindow


def window(ends: list[int], special: list[bool] | None = None, exact: list[bool] | None = None) -> TokenizedWindow:
    flags = np.array(special if special is not None else [False] * len(ends), dtype=bool)
    exactly = np.ones(len(ends), bool) if exact is None else np.array(exact, dtype=bool)
    return TokenizedWindow(np.zeros(len(ends), np.int32), np.array(ends, np.int32), flags, exactly)


@st.composite
def windows(draw: st.DrawFn) -> TokenizedWindow:
    """Rising byte ends; special tokens anywhere, whose byte end is 0; some that have read something more."""
    ends = sorted(draw(st.sets(st.integers(1, 20), max_size=15)))
    special, vague = (draw(st.lists(st.booleans(), min_size=len(ends), max_size=len(ends))) for _ in range(2))
    return window(
        [0 if s else e for e, s in zip(ends, special, strict=True)],
        special,
        [s or not v for s, v in zip(special, vague, strict=True)],
    )


def slow_positions(source: TokenizedWindow, target: TokenizedWindow) -> list[int]:
    taken = []
    for t, end in enumerate(target.byte_end):
        read = [
            s
            for s in range(len(source.ids))
            if not source.special[s] and source.exact[s] and 0 < source.byte_end[s] <= end
        ]
        taken.append(read[-1] if read and not target.special[t] else -1)
    return taken


@given(source=windows(), target=windows())
def test_positions_equal_the_slow_search(source: TokenizedWindow, target: TokenizedWindow) -> None:
    assert source_positions(source, target).tolist() == slow_positions(source, target)


@given(source=windows())
def test_a_window_takes_exactly_its_own_states(source: TokenizedWindow) -> None:
    own = np.where(source.special, -1, np.arange(len(source.ids)))
    taken = source_positions(source, source)
    np.testing.assert_array_equal(taken[source.exact], own[source.exact])


@given(source=windows(), target=windows())
def test_no_position_is_told_what_comes_after_it(source: TokenizedWindow, target: TokenizedWindow) -> None:
    taken = source_positions(source, target)
    for position in np.flatnonzero(taken >= 0):
        assert source.byte_end[taken[position]] <= target.byte_end[position]
        assert source.exact[taken[position]]


def test_inside_a_character_the_ends_are_those_of_its_bytes() -> None:
    # A three-byte character after "a", as one, two (of two bytes and one) and three tokens.
    one, two, three = window([1, 4, 5]), window([1, 3, 4, 5]), window([1, 2, 3, 4, 5])
    assert source_positions(three, three).tolist() == [0, 1, 2, 3, 4]
    assert source_positions(three, one).tolist() == [0, 3, 4]
    assert source_positions(one, three).tolist() == [0, 0, 0, 1, 2]
    assert source_positions(two, three).tolist() == [0, 0, 1, 2, 3]


def test_a_space_put_before_the_text_says_nothing_and_is_told_nothing() -> None:
    assert source_positions(window([0, 3]), window([0, 2, 3])).tolist() == [-1, -1, 1]


def test_the_state_is_that_of_the_last_token_ending_at_or_before() -> None:
    # Source reads "ab|cde|f", target "a|bc|d|ef"; the target's first token ends before any source token does.
    assert source_positions(window([2, 5, 6]), window([1, 3, 4, 6])).tolist() == [-1, 0, 0, 2]


def test_no_source_token_means_every_target_token_keeps_its_own() -> None:
    assert source_positions(window([0], [True]), window([1, 2])).tolist() == [-1, -1]
    assert source_positions(window([]), window([1])).tolist() == [-1]
    assert source_positions(window([1]), window([])).tolist() == []
