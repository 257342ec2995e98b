"""Which rows take the part of a start token."""

from __future__ import annotations

import numpy as np
import pytest

from featstore.store.read.first import first_rows

#: Tokens of a window as (bytes read, special), and which of them are first.
WINDOWS = {
    "a word": ([(3, False), (5, False), (9, False)], [True, False, False]),
    "a start token": ([(0, True), (3, False)], [False, False]),
    "a space that is not in the text": ([(0, False), (1, False), (2, False)], [True, True, False]),
    "an ending token": ([(2, False), (0, True)], [True, False]),
    "one that reads nothing in between": ([(2, False), (2, False), (3, False)], [True, False, False]),
    "a part of a character": ([(1, False), (3, False)], [True, False]),
}


@pytest.mark.parametrize("names", [[name] for name in WINDOWS] + [list(WINDOWS), list(WINDOWS)[::-1] * 2])
def test_the_first_token_of_a_window_that_begins_with_text(names: list[str]) -> None:
    tokens = [(number, *token) for number, name in enumerate(names) for token in WINDOWS[name][0]]
    window, byte_end, special = (np.array(column) for column in zip(*tokens, strict=True))
    wanted = [first for name in names for first in WINDOWS[name][1]]
    assert first_rows(window, byte_end, special).tolist() == wanted


def test_nothing_is_first_where_there_is_nothing() -> None:
    none = np.zeros(0, np.int32)
    assert len(first_rows(none, none, none.astype(bool))) == 0
