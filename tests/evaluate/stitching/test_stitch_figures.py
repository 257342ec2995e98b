"""The figures of a stitched run, by hand: from sums over documents to losses, differences, shares and intervals."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import t as student

from align.layers import LayerPair
from align.maps.fitted import Aligner
from evaluate.injection.controls import CONTROLS
from evaluate.injection.wire import Wire
from evaluate.stitching.figures import alone, compared, figures, perplexity
from evaluate.stitching.findings import findings
from evaluate.stitching.scores import Tally
from evaluate.stitching.stitch import _Stitcher
from evaluate.stitching.words import describe

#: Four documents of 30 to 10 tokens over 60 to 40 bytes, and for each condition the nats per token in each.
TOKENS, BYTES = (30, 10, 20, 20), (60, 40, 50, 50)
LOSSES = {
    "clean": (1.0, 2.0, 1.5, 1.0),
    "self": (1.0, 2.0, 1.5, 1.0),
    "mapped": (2.0, 3.0, 2.5, 2.25),
    "token": (3.0, 4.5, 3.25, 3.0),
    "mean": (5.0, 8.0, 6.0, 6.0),
    "zero": (9.0, 9.0, 9.0, 9.0),
    "random_norm": (4.0, 10.0, 7.0, 6.0),
    "random_rotation": (4.5, 5.0, 5.0, 4.5),
    "shuffled": (4.0, 6.0, 5.0, 5.0),
    "raw": (7.0, 7.0, 8.0, 7.0),
}
#: Nats of divergence per token and the share of tokens with the clean first choice, by document.
DIVERGENCES = {"mapped": ((1.0, 3.0, 2.0, 1.0), (0.9, 0.5, 0.7, 0.8))}


def tally_of(values: tuple[float, ...], name: str = "") -> Tally:
    """In two windows each, the later documents first: sums are by document."""
    tally = Tally()
    zero, one = (0.0,) * len(values), (1.0,) * len(values)
    divergences, shares = DIVERGENCES.get(name, (zero, one))
    for document in reversed(range(len(values))):
        for part in (0.2, 0.8):
            tokens, size = TOKENS[document] * part, BYTES[document] * part
            same = round(shares[document] * tokens * 10) / 10
            tally.add(document, values[document] * tokens, int(tokens), int(size), divergences[document] * tokens, same)
    return tally


def run_of(losses: dict[str, tuple[float, ...]], source: str = "a", reasons: dict[str, str] | None = None) -> Any:
    """A run with made-up losses: what is measured before and written after the figures is left out."""
    windows = [
        SimpleNamespace(target=SimpleNamespace(special=np.zeros(n + 2, bool)), places=np.arange(n + 2), size=1)
        for n in TOKENS
    ]
    pair = LayerPair(source, (1,), "b", 2)
    to = Wire(Aligner(pair, {}), None, False, None)
    run = _Stitcher(None, windows, [to], {}, keep="own", controls=CONTROLS, seed=0)  # type: ignore[arg-type]
    run._identical[pair.key] = True
    run._tallies |= {(pair.key, name): tally_of(values, name) for name, values in losses.items()}
    run._reasons[pair.key] = reasons or {}
    return SimpleNamespace(entry=run.entry(to), documents=run.documents(to))


def entry_of(losses: dict[str, tuple[float, ...]], source: str = "a", **reasons: str) -> dict[str, Any]:
    entry: dict[str, Any] = run_of(losses, source, reasons).entry
    return entry


def interval_of(numerator: Any, denominator: Any) -> list[float]:
    """The linearised t interval of a ratio of sums over documents, written down anew."""
    a, b = np.asarray(numerator, float), np.asarray(denominator, float)
    value, share = a.sum() / b.sum(), b / b.sum()
    error = math.sqrt(sum((x - value * y) ** 2 / (1 - w) for x, y, w in zip(a, b, share, strict=True))) / b.sum()
    half = student.ppf(0.975, 1 / (share**2).sum() - 1) * error
    return [value - half, value + half]


def nats_of(name: str) -> NDArray[np.float64]:
    return np.array(LOSSES[name]) * TOKENS


def test_losses_are_pooled_over_tokens() -> None:
    entry = entry_of(LOSSES)
    assert (entry["n_documents"], entry["n_tokens"]) == (4, 80)
    # Shares of 3/8, 1/8, 2/8 and 2/8.
    assert entry["effective_documents"] == pytest.approx(64 / 18)
    shown = {name: block["nats_per_token"] for name, block in entry["conditions"].items()}
    assert shown["clean"] == pytest.approx((30 * 1 + 10 * 2 + 20 * 1.5 + 20 * 1) / 80)
    for name in LOSSES:
        assert shown[name] == pytest.approx(nats_of(name).sum() / 80)
    # 100 nats are 144.27 bits, over 200 bytes.
    assert entry["conditions"]["clean"]["bits_per_byte"] == pytest.approx(0.72135, abs=1e-5)


def test_intervals_are_linearised_ones_over_documents() -> None:
    conditions = entry_of(LOSSES)["conditions"]
    mapped = conditions["mapped"]
    assert mapped["ci95"] == pytest.approx(interval_of(nats_of("mapped"), TOKENS))
    assert mapped["perplexity_ci95"] == pytest.approx([math.exp(end) for end in mapped["ci95"]])
    assert mapped["bits_per_byte_ci95"] == pytest.approx(interval_of(nats_of("mapped") / math.log(2), BYTES))
    divergence, same = (np.array(values) * TOKENS for values in DIVERGENCES["mapped"])
    assert mapped["kl"] == pytest.approx(divergence.sum() / 80)
    assert mapped["kl_ci95"] == pytest.approx(interval_of(divergence, TOKENS))
    assert mapped["top1"] == pytest.approx(same.sum() / 80)
    assert mapped["top1_ci95"] == pytest.approx(interval_of(same, TOKENS))
    # Against the mean state, on the same documents.
    less = nats_of("mean") - nats_of("mapped")
    assert mapped["below_mean"] == pytest.approx(less.sum() / 80)
    assert mapped["below_mean_ci95"] == pytest.approx(interval_of(less, TOKENS))
    assert conditions["mean"]["below_mean_ci95"] == [0, 0]
    assert conditions["clean"]["kl_ci95"] == [0, 0]
    assert conditions["clean"]["top1_ci95"] == [1, 1]


def test_differences_from_controls_are_in_nats_on_the_same_documents() -> None:
    entry = entry_of(LOSSES)
    assert list(entry["controls"]) == list(CONTROLS)
    for name, block in entry["controls"].items():
        less = nats_of(name) - nats_of("mapped")
        assert block["nats"] == pytest.approx(less.sum() / 80)
        assert block["ci95"] == pytest.approx(interval_of(less, TOKENS))
        assert block["beaten"]
        assert 0 < block["p"] < 0.05
    # The difference is better known than either loss: what makes a document hard is common to both.
    token, loss = entry["beyond_token"], entry["conditions"]["token"]
    assert token == entry["controls"]["token"]
    assert np.diff(token["ci95"]) < np.diff(loss["ci95"]) / 1.5
    assert entry["beats_every_control"] is True
    assert entry["closest_control"] == "token"


def test_recovered_shares_count_from_the_token_and_from_the_mean_state() -> None:
    entry = entry_of(LOSSES)
    for figure, control in (("recovered_token", "token"), ("recovered", "mean")):
        up, down = (nats_of(control) - nats_of(name) for name in ("mapped", "clean"))
        assert entry[figure]["value"] == pytest.approx(up.sum() / down.sum())
        # Fieller: theta is in the interval where up - theta down is not told from zero.
        low, high = entry[figure]["ci95"]
        for theta, inside in ((low + 1e-6, True), (high - 1e-6, True), (low - 1e-6, False), (high + 1e-6, False)):
            ends = interval_of(up - theta * down, TOKENS)
            assert bool(ends[0] < 0 < ends[1]) is inside, (figure, theta)
    # A map that does better than the model's own states recovers more than everything, a harmful one less than nothing.
    better = entry_of({**LOSSES, "mapped": (0.5, 1.5, 1.0, 0.5)})["recovered"]["value"]
    worse = entry_of({**LOSSES, "mapped": (6.0, 8.5, 6.5, 6.5)})["recovered"]["value"]
    assert better > 1
    assert worse < 0


def test_a_control_that_equals_the_map_is_not_beaten() -> None:
    for name in CONTROLS:
        entry = entry_of({**LOSSES, name: LOSSES["mapped"]})
        assert entry["controls"][name] == {"nats": 0, "ci95": [0, 0], "p": 1, "beaten": False}
        assert entry["beats_every_control"] is False
        assert entry["closest_control"] == name
        assert f"does not beat {name}" in describe({"pairs": {"a:1->b:2": entry}})


def test_one_control_that_cannot_be_told_apart_is_enough() -> None:
    # Better in three documents of four, by far in none.
    entry = entry_of({**LOSSES, "shuffled": (2.4, 2.8, 2.6, 2.5)})
    assert entry["controls"]["shuffled"]["nats"] > 0
    assert entry["controls"]["shuffled"]["ci95"][0] < 0
    assert (entry["beats_every_control"], entry["controls"]["mean"]["beaten"]) == (False, True)


def test_a_map_that_is_the_token_table_adds_nothing_to_it() -> None:
    entry = entry_of({**LOSSES, "token": LOSSES["mapped"]})
    assert entry["recovered_token"]["value"] == pytest.approx(0)
    assert entry["recovered"]["value"] > 0.5
    assert entry["beats_every_control"] is False
    codes = [found["code"] for found in findings("a:1->b:2", entry)]
    assert codes == ["few-documents", "token-explains"]
    # Beyond the token by more than the interval there is nothing to object to but the documents.
    assert [found["code"] for found in findings("a:1->b:2", entry_of(LOSSES))] == ["few-documents"]
    assert list(findings("a:1->b:2", entry_of(LOSSES) | {"effective_documents": 30.0, "n_documents": 31})) == []


def test_two_documents_have_no_interval_and_no_verdict() -> None:
    entry = entry_of({name: values[:2] for name, values in LOSSES.items()})
    for block in (*entry["conditions"].values(), entry["alone"]["target"]):
        assert {name for name in block if name.endswith("ci95") and block[name] is not None} == set()
    assert all(
        (block["ci95"], block["p"], block["beaten"]) == (None, None, None) for block in entry["controls"].values()
    )
    assert (entry["recovered"]["ci95"], entry["recovered_token"]["ci95"]) == (None, None)
    # The figures are there; what they are worth is not known.
    assert entry["recovered"]["value"] == pytest.approx(3.5 / 4.5)
    assert entry["beats_every_control"] is None
    for name in ("ci95", "beats_every_control", "recovered.ci95", "recovered_token.ci95"):
        assert "at least 3 test documents, not 2" in entry["reasons"][name]
    lines = describe({"pairs": {"a:1->b:2": entry}})
    assert "not known to beat every control: an interval needs at least 3" in lines
    assert "[no interval]" in lines


def test_a_share_needs_a_control_that_does_harm() -> None:
    # In some documents the token's prediction is better than the clean run, in others worse: no interval.
    entry = entry_of({**LOSSES, "token": (1.5, 1.0, 2.0, 0.9)})
    assert entry["recovered_token"]["ci95"] is None
    assert "not clearly above the clean one" in entry["reasons"]["recovered_token"]
    # The decision in nats stands all the same.
    assert entry["controls"]["token"]["beaten"] is False
    # No harm at all: no share either.
    entry = entry_of({**LOSSES, "mean": (1.0, 1.0, 1.0, 1.0)})
    assert entry["recovered"] == {"value": None, "ci95": None}
    assert entry["reasons"]["recovered"] == "the mean control does no harm, so there is nothing to recover"
    assert entry["beats_every_control"] is False


def test_a_run_without_a_token_table_beats_no_more_than_the_others() -> None:
    without = {name: values for name, values in LOSSES.items() if name != "token"}
    entry = entry_of(without, token="the run has no table")
    assert entry["beats_every_control"] is None
    assert entry["reasons"]["beats_every_control"] == "not compared with token"
    assert entry["beyond_token"] == {"nats": None, "ci95": None, "p": None, "beaten": None}
    assert entry["recovered_token"] == {"value": None, "ci95": None}
    for name in ("token", "beyond_token", "recovered_token"):
        assert entry["reasons"][name] == "the run has no table"
    assert "beyond the token: not known (the run has no table)" in describe({"pairs": {"a:1->b:2": entry}})
    # What another control refutes needs no table.
    assert entry_of({**without, "shuffled": LOSSES["mapped"]})["beats_every_control"] is False


def test_raw_states_are_a_control_unless_they_have_another_width_or_are_the_models_own() -> None:
    losses = {**LOSSES, "raw": (1.5, 2.5, 2.0, 1.75)}
    assert entry_of(losses)["beats_every_control"] is False
    own = entry_of(losses, source="b")
    assert own["beats_every_control"] is True
    assert "raw" not in own["controls"]
    without = entry_of(
        {name: values for name, values in LOSSES.items() if name != "raw"}, raw="widths differ (6 and 8)"
    )
    assert without["conditions"]["raw"] is None
    assert without["beats_every_control"] is True


def test_sums_by_document_give_the_figures_again() -> None:
    run = run_of(LOSSES)
    sums = run.documents
    assert (sums["documents"], sums["tokens"], sums["bytes"]) == ([0, 1, 2, 3], list(TOKENS), list(BYTES))
    for name, block in run.entry["conditions"].items():
        assert sums["nats"][name] == pytest.approx(nats_of(name))
        for figure, sum_ in (("nats_per_token", "nats"), ("kl", "kl"), ("top1", "same")):
            assert sum(sums[sum_][name]) / sum(sums["tokens"]) == pytest.approx(block[figure])
    assert sums["same"]["mapped"] == [27, 5, 14, 16]


def test_a_loss_beyond_float64_has_no_perplexity_and_no_warning() -> None:
    assert perplexity(0.0) == 1
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert perplexity(1e4) == math.inf


def test_tokens_without_bytes_have_no_bits() -> None:
    tally = Tally()
    for document in range(3):
        tally.add(document, 3.0 + document, 2, 0)
    table = tally.table()
    block = figures(table)
    assert (block["bits_per_byte"], block["bits_per_byte_ci95"]) == (None, None)
    assert block["nats_per_token"] == pytest.approx(12 / 6)
    _, reasons = compared({"clean": table, "mapped": table}, (), {})
    assert reasons["bits_per_byte"] == "the scored tokens span no byte"


def test_a_model_alone_is_described_by_its_own_tokens_only() -> None:
    tally = Tally()
    tally.add(0, 30.0, 30, 60)
    tally.add(1, 20.0, 10, 40)
    block = alone(tally.table())
    assert (block["n_documents"], block["n_tokens"], block["n_bytes"]) == (2, 40, 100)
    assert block["effective_documents"] == pytest.approx(1.6)
    assert block["perplexity"] == pytest.approx(math.exp(1.25))
    assert block["bits_per_byte"] == pytest.approx(50 / math.log(2) / 100)
    # What compares with the untouched predictions has nothing to say here.
    assert not {name for name in block if name.startswith(("kl", "top1", "below_mean"))}


def test_the_lines_lead_with_what_is_left_beyond_the_token() -> None:
    reasons = {"raw": "widths differ (6 and 8)"}
    entry = entry_of({name: values for name, values in LOSSES.items() if name != "raw"}, **reasons)
    entry["warnings"] = list(findings("a:1->b:2", entry))
    lines = describe({"keep": "hide", "pairs": {"a:1->b:2": entry}}).splitlines()
    assert lines[0] == (
        "a:1->b:2: 80 tokens of 4 documents (3.6 effective), 100% of positions replaced, the others hidden"
    )
    assert lines[1].startswith("  beyond the token: +0.938 nats/token [+0.")
    assert "46.9% [" in lines[1]
    assert lines[1].endswith("of the way from the token alone to clean")
    assert lines[2].startswith("  beats every control; the closest is token, +0.938 nats/token [")
    table = {line.split()[0]: line for line in lines[3:] if line.startswith("  ")}
    assert "2.312 nats/token [1.67" in table["mapped"]
    assert "bits/byte  KL  1.500  top-1  78%" in table["mapped"]
    assert table["raw"].endswith("-  (widths differ (6 and 8))")
    assert "from the mean state" in table["recovered"]
    assert "4 documents (3.6 effective)" in table["warning:"]
