"""The sums of a stitched run, by hand: from logits to sums over documents."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from evaluate.stitching.scores import Tally, add_window
from featstore.text.tokens import TokenizedWindow


def test_a_window_is_scored_as_the_formulas_say() -> None:
    # Longer than a slice of positions, with a special token in the middle.
    rng = np.random.default_rng(0)
    count, vocabulary = 300, 11
    q, p = rng.standard_normal((2, count, vocabulary)) * 2
    ids, special = rng.integers(vocabulary, size=count), np.zeros(count, bool)
    special[[0, 150]] = True
    ends = np.sort(rng.integers(1, 900, size=count)).astype(np.int32)
    tally = Tally()
    add_window(
        tally, 3, TokenizedWindow(ids, ends, special, np.ones(len(ids), bool)), torch.from_numpy(q), torch.from_numpy(p)
    )
    log_q, log_p = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (q, p))
    at = np.array([t for t in range(2, count) if not special[t]])
    nats = -log_q[at - 1, ids[at]].sum()
    divergence = sum(float(np.exp(log_p[t - 1]) @ (log_p[t - 1] - log_q[t - 1])) for t in at)
    same = sum(int(q[t - 1].argmax() == p[t - 1].argmax()) for t in at)
    assert list(tally.sums) == [3]
    assert tally.sums[3] == pytest.approx([nats, len(at), ends[-1] - ends[1], divergence, same], rel=1e-5)
    # The untouched predictions do not diverge from themselves, whether they are given twice or once.
    for clean in (None, torch.from_numpy(q).clone()):
        other = Tally()
        add_window(other, 3, TokenizedWindow(ids, ends, special, np.ones(len(ids), bool)), torch.from_numpy(q), clean)
        assert other.sums[3][3:].tolist() == [0, len(at)]


def test_a_window_whose_scored_tokens_are_all_special_counts_for_nothing() -> None:
    special = np.array([False, False, True, True])
    tally = Tally()
    add_window(
        tally, 0, TokenizedWindow(np.arange(4), np.array([1, 4, 0, 0]), special, np.ones(4, bool)), torch.randn(4, 7)
    )
    assert tally.sums[0].tolist() == [0, 0, 0, 0, 0]
    # Its document is none of those behind an interval.
    assert tally.documents == []
    assert tally.table().shape == (0, 5)
    tally.add(4, 1.0, 2, 3)
    assert tally.documents == [4]
    assert tally.table().tolist() == [[1, 2, 3, 0, 2]]


def test_special_tokens_at_the_end_take_no_bytes() -> None:
    # A special token's end is 0: the bytes are those up to the last token that has any.
    special = np.array([True, False, False, False, True])
    tally = Tally()
    add_window(
        tally, 0, TokenizedWindow(np.arange(5), np.array([0, 2, 5, 9, 0]), special, np.ones(5, bool)), torch.zeros(5, 8)
    )
    assert tally.sums[0] == pytest.approx([2 * math.log(8), 2, 7, 0, 2])


def test_tokens_that_do_not_count_take_no_part() -> None:
    special = np.array([True, False, False, False, False, True, False])
    ends = np.array([0, 2, 5, 9, 10, 0, 14], np.int32)
    tokens = TokenizedWindow(np.arange(7), ends, special, np.ones(7, bool))
    logits = torch.randn(7, 8, generator=torch.Generator().manual_seed(0))
    some = np.array([True, True, False, True, False, True, True])
    sums = []
    for counts in (some, ~some, None):
        tally = Tally()
        add_window(tally, 0, tokens, logits, logits.roll(1, dims=0), counts=counts)
        sums.append(tally.sums[0])
    # Bytes are those of the scored tokens themselves: 5 to 9, and 10 to 14 past a special token; and the rest.
    assert sums[0][1:3].tolist() == [2, 8]
    assert sums[1][1:3].tolist() == [2, 4]
    assert sums[0] + sums[1] == pytest.approx(sums[2])
    expected = -float(logits[2].log_softmax(0)[3] + logits[5].log_softmax(0)[6])
    assert sums[0][0] == pytest.approx(expected, rel=1e-5)


def test_bytes_of_a_window_are_those_that_its_scored_tokens_read() -> None:
    # A space that reads nothing, a character in three tokens of which two end inside it, a token that reads nothing.
    ends, special = np.array([0, 0, 1, 2, 4, 4, 9]), np.array([True] + [False] * 6)
    exact = np.array([True, True, True, False, True, True, True])
    tally = Tally()
    add_window(tally, 0, TokenizedWindow(np.arange(7), ends, special, exact), torch.zeros(7, 8))
    assert tally.sums[0] == pytest.approx([5 * math.log(8), 5, 9, 0, 5])
    # What was read before the first scored token is not counted, whichever of the two tokens read it.
    for first, second in ((True, False), (False, True)):
        special, ends = np.array([first, second, False, False]), np.array([0, 5, 5, 8] if first else [5, 0, 5, 8])
        tally = Tally()
        add_window(tally, 0, TokenizedWindow(np.arange(4), ends, special, np.ones(4, bool)), torch.zeros(4, 8))
        assert tally.sums[0][2] == 3


def test_half_precision_logits_are_scored_in_float32() -> None:
    logits = (8 * torch.randn(40, 300, generator=torch.Generator().manual_seed(0))).bfloat16()
    clean = logits.roll(1, dims=0)
    tokens = TokenizedWindow(np.arange(40), np.arange(1, 41), np.zeros(40, bool), np.ones(40, bool))
    half, full = Tally(), Tally()
    add_window(half, 0, tokens, logits, clean)
    add_window(full, 0, tokens, logits.float(), clean.float())
    assert half.sums[0].tolist() == full.sums[0].tolist()


def test_documents_come_in_their_order() -> None:
    tally = Tally()
    for document in (7, 2, 5):
        tally.add(document, float(document), 1, 1)
    assert tally.table()[:, 0].tolist() == [2, 5, 7]
