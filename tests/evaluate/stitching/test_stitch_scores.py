"""The figures of a stitched run, by hand: from logits to sums over documents, and from these to what is reported."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from align.layers import LayerPair
from align.maps.fitted import Aligner
from evaluate.injection.controls import CONTROLS
from evaluate.injection.wire import Wire
from evaluate.stitching.scores import Tally, add_window, alone, describe, figures, perplexity
from evaluate.stitching.stitch import _Stitcher
from featstore.text.tokens import TokenizedWindow

#: Two documents of 30 and 10 tokens over 60 and 40 bytes, and for each condition the nats per token in either.
TOKENS, BYTES = (30, 10), (60, 40)
LOSSES = {
    "clean": (1.0, 2.0),
    "self": (1.0, 2.0),
    "mapped": (2.0, 3.0),
    "mean": (5.0, 8.0),
    "zero": (9.0, 9.0),
    "random_norm": (4.0, 10.0),
    "random_rotation": (4.5, 4.0),
    "shuffled": (4.0, 6.0),
    "raw": (7.0, 7.0),
}


#: Nats of divergence per token and the share of tokens with the clean first choice, by document.
DIVERGENCES = {"mapped": ((1.0, 3.0), (0.9, 0.5)), "mean": ((4.0, 6.0), (0.1, 0.3))}


def entry_of(losses: dict[str, tuple[float, float]], source: str = "a") -> dict[str, Any]:
    """The entry of made-up losses: what is measured before and written after it is left out."""
    windows = [
        SimpleNamespace(target=SimpleNamespace(special=np.zeros(n + 2, bool)), places=np.arange(n + 2), size=1)
        for n in TOKENS
    ]
    pair = LayerPair(source, (1,), "b", 2)
    to = Wire(Aligner(pair, {}), None, False, None)
    run = _Stitcher(None, windows, [to], keep="own", controls=CONTROLS, seed=0)  # type: ignore[arg-type]
    run._identical[pair.key] = True
    for name, values in losses.items():
        tally = run._tallies[pair.key, name] = Tally()
        for document in (1, 0):
            # In two windows each: sums are by document.
            for part in (0.2, 0.8):
                tokens, size = TOKENS[document] * part, BYTES[document] * part
                divergences, shares = DIVERGENCES.get(name, ((0.0, 0.0), (1.0, 1.0)))
                same = round(shares[document] * tokens * 10) / 10
                divergence = divergences[document] * tokens
                tally.add(document, values[document] * tokens, int(tokens), int(size), divergence, same)
    return run.entry(to)


def test_losses_are_pooled_over_tokens() -> None:
    entry = entry_of(LOSSES)
    assert (entry["n_documents"], entry["n_tokens"]) == (2, 40)
    figures = {name: block["nats_per_token"] for name, block in entry["conditions"].items()}
    # (30 * 1 + 10 * 2) / 40 and so on; the mean of the documents' means would be 1.5.
    assert figures == {
        "clean": pytest.approx(1.25),
        "self": pytest.approx(1.25),
        "mapped": pytest.approx(2.25),
        "mean": pytest.approx(5.75),
        "zero": pytest.approx(9.0),
        "random_norm": pytest.approx(5.5),
        "random_rotation": pytest.approx(4.375),
        "shuffled": pytest.approx(4.5),
        "raw": pytest.approx(7.0),
    }
    # 50 nats are 72.13 bits, over 100 bytes.
    assert entry["conditions"]["clean"]["bits_per_byte"] == pytest.approx(0.72135, abs=1e-5)
    assert entry["conditions"]["mapped"]["bits_per_byte"] == pytest.approx(1.29843, abs=1e-5)


def test_recovered_is_the_share_of_the_way_from_the_mean_state_to_the_clean_loss() -> None:
    # (5.75 - 2.25) / (5.75 - 1.25), of pooled losses; the mean of the documents' own shares would be 0.792.
    entry = entry_of(LOSSES)
    assert entry["recovered"]["value"] == pytest.approx(3.5 / 4.5)
    # Resampling two documents gives one of them twice or both: 3 / 4 and 5 / 6 are the ends.
    assert entry["recovered"]["ci95"] == [pytest.approx(3 / 4), pytest.approx(5 / 6)]
    # A map that does better than the model's own states recovers more than everything, a harmful one less than nothing.
    better = entry_of({**LOSSES, "mapped": (0.5, 1.5)})["recovered"]["value"]
    worse = entry_of({**LOSSES, "mapped": (6.0, 8.0)})["recovered"]["value"]
    assert (better, worse) == (pytest.approx(5 / 4.5), pytest.approx(-0.75 / 4.5))


def test_the_best_control_is_the_one_with_the_lowest_pooled_loss() -> None:
    # In the larger document alone `shuffled` and `random_norm` are lower; `clean`, `self` and `mapped` are no controls.
    best = entry_of(LOSSES)["recovered_best_control"]
    assert best["control"] == "random_rotation"
    assert best["value"] == pytest.approx((4.375 - 2.25) / (4.375 - 1.25))
    # By document means `shuffled` (4.5) would lose to `random_rotation` (4.25); pooled it wins, 3.75 to 4.375.
    other = entry_of({**LOSSES, "shuffled": (3.0, 6.0)})["recovered_best_control"]
    assert other["control"] == "shuffled"
    assert other["value"] == pytest.approx((3.75 - 2.25) / (3.75 - 1.25))


def test_divergence_agreement_and_perplexity_by_hand() -> None:
    conditions = entry_of(LOSSES)["conditions"]
    mapped = conditions["mapped"]
    # (30 * 1 + 10 * 3) / 40, (30 * 0.9 + 10 * 0.5) / 40, e^2.25.
    assert (mapped["kl"], mapped["top1"]) == (pytest.approx(1.5), pytest.approx(0.8))
    assert mapped["perplexity"] == pytest.approx(9.487736)
    # Two documents resampled: either one twice, or both; the ends of each interval are the documents themselves.
    assert mapped["kl_ci95"] == [pytest.approx(1.0), pytest.approx(3.0)]
    assert mapped["top1_ci95"] == [pytest.approx(0.5), pytest.approx(0.9)]
    assert mapped["perplexity_ci95"] == [pytest.approx(math.exp(2)), pytest.approx(math.exp(3))]
    # 2 nats on 30 tokens over 60 bytes, and 3 nats on 10 over 40.
    assert mapped["bits_per_byte_ci95"] == [pytest.approx(0.75 / math.log(2)), pytest.approx(1 / math.log(2))]
    # Against the mean state: (30 * (5 - 2) + 10 * (8 - 3)) / 40.
    assert mapped["below_mean"] == pytest.approx(3.5)
    assert mapped["below_mean_ci95"] == [pytest.approx(3.0), pytest.approx(5.0)]
    assert conditions["zero"]["below_mean"] == pytest.approx((30 * -4 + 10 * -1) / 40)
    assert conditions["mean"]["below_mean_ci95"] == [0, 0]
    assert conditions["clean"]["kl_ci95"] == [0, 0]
    assert conditions["clean"]["top1_ci95"] == [1, 1]


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


def test_raw_states_are_a_control_unless_source_and_target_are_one_model() -> None:
    losses = {**LOSSES, "raw": (1.5, 2.5)}
    foreign = entry_of(losses)["recovered_best_control"]
    assert foreign["control"] == "raw"
    assert foreign["value"] == pytest.approx((1.75 - 2.25) / (1.75 - 1.25))
    assert entry_of(losses, source="b")["recovered_best_control"]["control"] == "random_rotation"
    # Where widths differ there are none.
    without = entry_of({name: values for name, values in losses.items() if name != "raw"})
    assert without["conditions"]["raw"] is None
    assert without["recovered_best_control"]["control"] == "random_rotation"


def test_nothing_is_recovered_where_the_control_does_no_harm() -> None:
    entry = entry_of({**LOSSES, "mean": (1.0, 1.0)})
    assert math.isnan(entry["recovered"]["value"])
    assert entry["recovered_best_control"]["control"] == "mean"


def test_a_window_whose_scored_tokens_are_all_special_counts_for_nothing() -> None:
    special = np.array([False, False, True, True])
    tally = Tally()
    add_window(
        tally, 0, TokenizedWindow(np.arange(4), np.array([1, 4, 0, 0]), special, np.ones(4, bool)), torch.randn(4, 7)
    )
    assert tally.sums[0].tolist() == [0, 0, 0, 0, 0]


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


def test_a_loss_beyond_float64_has_no_perplexity_and_no_warning() -> None:
    assert perplexity(0.0) == 1
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert perplexity(1e4) == math.inf


def test_tokens_without_bytes_have_no_bits() -> None:
    tally = Tally()
    tally.add(0, 3.0, 2, 0)
    tally.add(1, 4.0, 2, 0)
    block = figures(tally.table())
    assert (block["bits_per_byte"], block["bits_per_byte_ci95"]) == (None, [None, None])
    assert block["nats_per_token"] == pytest.approx(7 / 4)


def test_intervals_resample_documents_with_all_their_tokens() -> None:
    from align.metrics import document_bootstrap

    rng = np.random.default_rng(0)
    tally = Tally()
    for document in range(9):
        tokens = int(rng.integers(1, 200))
        tally.add(document, float(rng.uniform(1, 6)) * tokens, tokens, 4 * tokens, float(rng.uniform()) * tokens)
    table = tally.table()
    assert (table[:, 4] == table[:, 1]).all()
    block = figures(table)
    for name, column in (("ci95", 0), ("kl_ci95", 3)):
        assert block[name] == list(document_bootstrap(table[:, [column, 1]], (0, 1)))
    assert block["bits_per_byte_ci95"] == pytest.approx([bound / math.log(2) / 4 for bound in block["ci95"]])


def test_documents_come_in_their_order() -> None:
    tally = Tally()
    for document in (7, 2, 5):
        tally.add(document, float(document), 1, 1)
    assert tally.table()[:, 0].tolist() == [2, 5, 7]


def test_a_model_alone_is_described_by_its_own_tokens_only() -> None:
    tally = Tally()
    tally.add(0, 30.0, 30, 60)
    tally.add(1, 20.0, 10, 40)
    block = alone(tally.table())
    assert (block["n_documents"], block["n_tokens"], block["n_bytes"]) == (2, 40, 100)
    assert block["perplexity"] == pytest.approx(math.exp(1.25))
    assert block["bits_per_byte"] == pytest.approx(50 / math.log(2) / 100)
    # What compares with the untouched predictions has nothing to say here.
    assert not {name for name in block if name.startswith(("kl", "top1", "below_mean"))}


def test_the_lines_name_each_figure() -> None:
    entry = entry_of({name: values for name, values in LOSSES.items() if name != "raw"}) | {
        "reasons": {"raw": "widths differ (6 and 8)"}
    }
    lines = describe({"keep": "hide", "pairs": {"a:1->b:2": entry}}).splitlines()
    assert lines[0] == "a:1->b:2: 40 tokens of 2 documents, 100% of positions replaced, the others hidden"
    table = {line.split()[0]: line for line in lines[1:] if line.startswith("  ")}
    assert "2.250 nats/token [2.00, 3.00]" in table["mapped"]
    assert "1.298 bits/byte  KL  1.500  top-1  80%" in table["mapped"]
    assert table["raw"].endswith("-  (widths differ (6 and 8))")
    assert "  recovered  77.8% against mean [75.0%, 83.3%]" in lines
    assert any(line.startswith("  recovered  68.0% against random_rotation") for line in lines)
