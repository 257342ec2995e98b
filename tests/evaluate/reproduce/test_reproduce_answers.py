"""Answers from planted results: a verdict follows from the figures, and says so where there are none."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest

from align.layers import LayerPair
from align.training.stopping import stopping_epoch
from evaluate.reproduce.answers import answer_all, maps, models, training
from evaluate.reproduce.answers.base import (
    ANSWERED,
    HELD,
    LESS,
    MORE,
    NOT,
    OPEN,
    PARTLY,
    Judged,
    judge,
)
from evaluate.reproduce.evidence import Evidence, Value
from evaluate.reproduce.places import Places

PLACES = Places("a", "b", {"a": 32, "b": 32}, tuple(LayerPair("a", (k,), "b", k) for k in (0, 8, 16, 24, 32)))
KEYS = [pair.key for pair in maps.both(PLACES)]
MIDDLE = "a:16->b:16"
DOCUMENTS = 8


class Planted:
    """A directory of results that were written down, not measured."""

    def __init__(self, out):
        self.out = out

    def write(self, name, value):
        path = self.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))

    def run(self, name, r2, *, keys=KEYS, spread=0.01, **test):
        """A run of this R2 at every layer pair; documents differ by ``spread``."""
        rng = np.random.default_rng(0)
        sst = rng.uniform(50, 150, DOCUMENTS)
        noise = rng.uniform(-spread, spread, DOCUMENTS)
        sse = sst * (1 - r2 + noise - (sst * noise).sum() / sst.sum())
        figures = {"r2": r2, "r2_ci95": [r2 - spread, r2 + spread], "cka_debiased": 0.9, **test}
        entry = {"test": figures, "baselines": {}, "warnings": []}
        self.write(f"runs/{name}/metrics.json", {"type": name, "pairs": dict.fromkeys(keys, entry)})
        block = {
            "documents": list(range(DOCUMENTS)),
            "n": [9] * DOCUMENTS,
            "sst": sst.tolist(),
            "sse": {"map": sse.tolist()},
        }
        self.write(f"runs/{name}/documents.json", {"pairs": dict.fromkeys(keys, block)})
        self.write(f"runs/{name}/adapter.json", {})

    def stitch(self, run, recovered, *, keys=KEYS, beyond=None, into="", identical=True):
        def block(value):
            return {"value": value, "ci95": [value - 0.05, value + 0.05]}

        names = ("clean", "mapped", "token", "mean", "random_norm", "shuffled")
        beyond = recovered if beyond is None else beyond
        against = {"nats": beyond, "ci95": [beyond - 0.05, beyond + 0.05], "p": 0.01, "beaten": beyond > 0.05}
        entry = {
            "conditions": {name: {"nats_per_token": 3.0 + i} for i, name in enumerate(names)},
            "recovered": block(recovered),
            "recovered_token": block(beyond),
            "beyond_token": against,
            "controls": {"token": against},
            "beats_every_control": against["beaten"],
            "closest_control": "token",
            "self_bit_identical": identical,
        }
        where = f"runs/{run}/{into}/stitch.json" if into else f"runs/{run}/stitch.json"
        self.write(where, {"pairs": dict.fromkeys(keys, entry)})

    def epochs(self, run, losses, *, keys=KEYS, stitched=None):
        for epoch, loss in enumerate(losses):
            pair = {"val_loss": loss, "cka": 0.9, "cosine_sim": 0.8}
            texts = []
            if stitched is not None:
                recovered = {"value": 0.5, "ci95": [0.4, 0.6]}
                conditions = {"mapped": {"nats_per_token": stitched[epoch]}}
                pair["stitched"] = {"conditions": conditions, "recovered": recovered}
                texts = [{"text": f"text {epoch} | of a model\nthat goes on and on and on and on and on and on"}]
            self.write(
                f"runs/{run}/eval_epoch_{epoch}.json",
                {"epoch": epoch, "pairs": dict.fromkeys(keys, pair), "generations": texts},
            )

    @property
    def evidence(self):
        return Evidence(self.out, PLACES)


@pytest.fixture
def planted(tmp_path):
    return Planted(tmp_path)


def test_without_results_every_question_stays_open(planted):
    for answer in answer_all(planted.evidence):
        assert (answer.verdict, answer.tables, answer.sources) == (OPEN, [], [])
        assert "not done" in answer.found


def test_every_question_of_the_original_is_asked(planted):
    asked = " ".join(answer.question + answer.expected for answer in answer_all(planted.evidence))
    for words in ("ten epochs", "Which layers", "12 and 20", "multi-layer", "10 to 15 %", "90 to 95 %", "5 to 8 %",
                  "bias and rank", "controls", "same-model", "compress"):  # fmt: skip
        assert words in asked


@pytest.mark.parametrize(
    ("linear", "lora", "verdict"), [(0.8, 0.74, HELD), (0.8, 0.6, LESS), (0.8, 0.81, MORE), (0.8, 0.715, LESS)]
)
def test_what_lora_keeps(planted, linear, lora, verdict):
    planted.run("linear", linear)
    planted.run("lora", lora)
    answer = maps.lora_keeps(planted.evidence)
    assert answer.verdict == verdict
    assert f"{lora / linear:.1%}" in answer.found
    assert len(answer.tables[0].rows) == len(KEYS)


@pytest.mark.parametrize(("affine", "verdict"), [(0.85, HELD), (0.81, LESS), (0.9, MORE), (0.78, LESS)])
def test_what_affine_gains(planted, affine, verdict):
    planted.run("procrustes", 0.8)
    planted.run("affine", affine)
    answer = maps.affine_beats_procrustes(planted.evidence)
    assert answer.verdict == verdict
    assert f"{affine / 0.8 - 1:+.1%}" in answer.found


@pytest.mark.parametrize(("cka", "verdict"), [(0.9, HELD), (0.81, LESS), (0.96, MORE)])
def test_what_several_layers_gain(planted, cka, verdict):
    planted.run("affine", 0.8, cka_debiased=0.8)
    keys = [pair.key for _, pair in maps._joint(PLACES)]
    assert keys[0] == "a:8+16+24->b:8"
    assert keys[-1] == "b:8+16+24->a:24"
    planted.run("joint", 0.85, keys=keys, cka_debiased=cka)
    answer = maps.multi_layer(planted.evidence)
    assert answer.verdict == verdict
    assert f"{cka / 0.8 - 1:+.1%}" in answer.found
    assert "higher with its whole interval for 6 of 6 targets" in answer.found
    assert not any("at most" in words for words in answer.words)


def test_a_cka_near_one_leaves_no_room(planted):
    planted.run("affine", 0.8, cka_debiased=0.96)
    planted.run("joint", 0.8, keys=[pair.key for _, pair in maps._joint(PLACES)], cka_debiased=0.97)
    answer = maps.multi_layer(planted.evidence)
    assert answer.verdict == LESS
    assert any("4.2% at most" in words for words in answer.words)
    assert "for 0 of 6 targets" in answer.found


@pytest.mark.parametrize(
    ("losses", "verdict", "stops"),
    [
        ([1.0, 0.5, 0.4, 0.4, 0.4, 0.3], HELD, "4"),
        # Stopping keeps the best epoch so far, not the last one.
        ([1.0, 0.5, 0.4, 0.45, 0.47, 0.3], HELD, "4"),
        ([1.0, 0.5, 0.4, 0.3, 0.2, 0.1], NOT, "not within 5"),
        # It waits for two epochs, the last of which is the last anyway.
        ([1.0, 0.5, 0.4, 0.3, 0.3, 0.3], NOT, "5"),
    ],
)
def test_whether_ten_epochs_are_too_many(planted, losses, verdict, stops):
    planted.run("lora", 0.8)
    planted.epochs("lora", losses)
    answer = training.epochs(planted.evidence)
    assert answer.verdict == verdict
    row = dict(zip(answer.tables[0].header, answer.tables[0].rows[0], strict=True))
    assert row["stops after"] == stops
    assert row["last"] == f"{losses[-1]:.4f}"
    missed = 0.1 if verdict == HELD else 0.0
    assert row["later epochs bring"] == f"{missed:.4f}"
    assert f"{missed:.4f} in the median" in answer.found


def test_some_trainings_stop_earlier_and_some_do_not(planted):
    planted.run("lora", 0.8)
    planted.epochs("lora", [1, 1, 1, 1])
    planted.run("affine-adamw", 0.8)
    planted.epochs("affine-adamw", [1.0, 0.9, 0.8, 0.7])
    assert training.epochs(planted.evidence).verdict == PARTLY


@pytest.mark.parametrize(
    ("losses", "patience", "epoch"),
    [
        ([1.0], 2, None),
        ([1.0, 0.9, 0.8], 2, None),
        ([1.0, 1.0, 1.0], 2, 2),
        ([1.0, 1.0, 0.5, 0.5, 0.5], 2, 4),
        # Each step is too small to count; together they do.
        ([1.0, 0.9994, 0.9988, 0.9982, 0.9976], 2, None),
        ([1.0, 0.9999, 0.9998, 0.9997], 1, 1),
    ],
)
def test_early_stopping_of_a_whole_curve(losses, patience, epoch):
    assert stopping_epoch(losses, patience=patience, min_delta=1e-3) == epoch


@pytest.mark.parametrize(("stitched", "verdict"), [([5, 4, 3.5], HELD), ([3, 4, 5], NOT)])
def test_whether_the_training_loss_says_anything_about_the_text(planted, stitched, verdict):
    planted.run("lora-epochs", 0.8, keys=[MIDDLE])
    planted.epochs("lora-epochs", [0.3, 0.2, 0.1], keys=[MIDDLE], stitched=stitched)
    answer = training.in_the_model(planted.evidence)
    assert answer.verdict == verdict
    assert [row[4] for row in answer.tables[0].rows] == [f"{nats:.3f}" for nats in stitched]
    last = answer.tables[0].rows[-1][-1]
    assert last.startswith("text 2 / of a model that")
    assert last.endswith("…")


@pytest.mark.parametrize(("adamw", "verdict"), [(0.798, HELD), (0.805, HELD), (0.77, NOT)])
def test_whether_gradient_reaches_the_closed_form(planted, adamw, verdict):
    planted.run("affine", 0.8)
    planted.run("affine-adamw", adamw)
    answer = training.gradient(planted.evidence)
    assert answer.verdict == verdict
    assert f"{adamw - 0.8:+.4f}" in answer.tables[0].rows[0][3]


@pytest.mark.parametrize(
    ("last", "verdict", "words"),
    [({32: -0.1}, HELD, "The last layer fails."), ({}, NOT, "works as well"), ({8: -0.1}, PARTLY, "works as well")],
)
def test_which_layers_work(planted, last, verdict, words):
    planted.run("procrustes", 0.8)
    planted.run("affine", 0.85)
    planted.stitch("affine", 0.9)
    block = json.loads((planted.out / "runs/affine/stitch.json").read_text())
    for key, entry in block["pairs"].items():
        layer = int(key.rpartition(":")[2])
        if layer in last:
            entry["beyond_token"] |= {"nats": last[layer], "ci95": [-0.2, 0.0], "beaten": False}
    planted.write("runs/affine/stitch.json", block)
    answer = maps.which_layers(planted.evidence)
    assert answer.verdict == verdict
    assert words in answer.found
    assert f"{len(KEYS) - 2 * len(last)} of {len(KEYS)} layer pairs" in answer.found
    assert [row[1] for row in answer.tables[0].rows][:5] == ["0%", "25%", "50%", "75%", "100%"]


def test_of_a_last_layer_without_a_figure_nothing_is_said(planted):
    planted.run("affine", 0.85)
    planted.stitch("affine", 0.9, keys=[MIDDLE])
    answer = maps.which_layers(planted.evidence)
    assert answer.verdict == OPEN
    assert "1 of 1 layer pairs" in answer.found
    assert answer.found.endswith("Of the last layer there is no figure.")


def test_what_bias_and_rank_buy(planted):
    planted.run("linear", 0.80)
    planted.run("affine", 0.81)
    planted.run("procrustes", 0.7)
    for rank, r2 in ((2, 0.3), (8, 0.6), (32, 0.78)):
        planted.run(f"rank-{rank}", r2)
        planted.run(f"rank-{rank}-on-procrustes", 0.7 + r2 / 10)
    answer = maps.bias_and_rank(planted.evidence)
    assert answer.verdict == ANSWERED
    assert "+0.0100 in the median" in answer.found
    assert any("rank 32 gives 95 %" in words for words in answer.words)
    ladder = dict(zip(answer.tables[1].header, answer.tables[1].rows[0], strict=True))
    assert (ladder["rank 8"], ladder["+ 8"], ladder["Procrustes"], ladder["affine"]) == (
        "0.600",
        "0.760",
        "0.700",
        "0.810",
    )


@pytest.mark.parametrize(
    ("r2", "recovered", "identical", "verdict"),
    [(1.0, 1.0, True, HELD), (0.99, 1.0, True, NOT), (1.0, 0.9, True, NOT), (1.0, 1.0, False, NOT)],
)
def test_the_ceiling(planted, r2, recovered, identical, verdict):
    for model in ("a", "b"):
        planted.run(f"self-{model}", r2, keys=[f"{model}:16->{model}:16"])
        planted.stitch(f"self-{model}", recovered, keys=[f"{model}:16->{model}:16"], identical=identical)
    answer = models.ceiling(planted.evidence)
    assert answer.verdict == verdict
    assert len(answer.tables[0].rows) == 2


@pytest.mark.parametrize(("procrustes", "affine", "verdict"), [(0.8, 0.8, HELD), (0.8, 0.01, PARTLY), (0.0, 0.02, NOT)])
def test_whether_anything_beats_the_controls(planted, procrustes, affine, verdict):
    for run, beyond in (("procrustes", procrustes), ("affine", affine)):
        planted.run(run, 0.8)
        planted.stitch(run, 0.9, keys=[MIDDLE], beyond=beyond)
    answer = models.controls(planted.evidence)
    assert answer.verdict == verdict
    assert f"{(procrustes > 0.05) + (affine > 0.05)} of 2 stitched losses" in answer.found


def talk(accuracies, gains, pair=MIDDLE, source="a"):
    """A part of ``communicate.json``; ``gains`` by mapped condition the low end against each control."""
    conditions = {
        name if condition in ("silent", "text") else f"{condition} {pair}": {
            "condition": condition,
            "pair": None if condition in ("silent", "text") else pair,
            "accuracy": value,
            "ci95": [value - 0.1, value + 0.1],
            "bytes": 29,
        }
        for condition, value in accuracies.items()
        for name in [condition]
    }
    told = {
        f"{condition} {pair}": {c: {"value": low + 0.1, "ci95": [low, low + 0.2]} for c, low in lows.items()}
        for condition, lows in gains.items()
    }
    return {
        "source": source,
        "target": "b",
        "n": 40,
        "chance": 0.05,
        "conditions": conditions,
        "gains": told,
        "warnings": [],
    }


@pytest.mark.parametrize(("aligned", "replace", "verdict"), [(0.1, 0.1, HELD), (0.1, -0.1, PARTLY), (-0.1, 0.0, NOT)])
def test_whether_states_tell_anything(planted, aligned, replace, verdict):
    accuracies = {"silent": 0.075, "text": 0.35, "aligned": 0.3, "replace": 0.1, "random": 0.05}
    gains = {"aligned": {"silent": 0.1, "random": aligned}, "replace": {"silent": 0.1, "random": replace}}
    planted.write("runs/affine/communicate.json", {"tasks": {"countries": talk(accuracies, gains)}})
    answer = models.communication(planted.evidence)
    assert answer.verdict == verdict
    # A model with itself is the ceiling, not the answer.
    own = talk({**accuracies, "aligned": 0.35}, {"aligned": {"silent": 0.2, "random": 0.2}}, source="b")
    tasks = {"countries": talk(accuracies, gains), "countries (b->b)": own}
    planted.write("runs/affine/communicate.json", {"tasks": tasks})
    assert models.communication(planted.evidence).found == answer.found
    assert models.communication(planted.evidence).verdict == verdict
    assert "b with itself: aligned a:16 → b:16, 35% right" in models.communication(planted.evidence).words[0]
    assert "aligned a:16 → b:16 with 30% right; told nothing 8% are, with the text 35%" in answer.found
    assert [row[0] for row in answer.tables[0].rows] == ["silent", "text", "replace", "aligned", "random"]


def test_what_compressed_states_cost(planted):
    for count, rate, recovered, right in ((8, 0.2, 0.2, 0.1), (32, 1.6, 0.6, 0.3)):
        run = f"compress-{count}x64"
        planted.run(run, 0.1, keys=[MIDDLE])
        block = json.loads((planted.out / f"runs/{run}/metrics.json").read_text())
        r2 = {"compress": 0.1, "pca": 0.05, "strided": None}
        block["pairs"][MIDDLE]["rate_distortion"] = {
            "bytes_per_text_byte": rate, "latents": count, "latent_dim": 64, "r2": r2,
        }  # fmt: skip
        planted.write(f"runs/{run}/metrics.json", block)
        planted.stitch(run, recovered, keys=[MIDDLE])
        told = talk({"silent": 0.075, "text": 0.35, "aligned": right}, {})
        told["pairs"] = {MIDDLE: {"rate": {"latent_bytes_per_text_byte": 17.7}}}
        tasks = {"countries": told}
        planted.write(f"runs/{run}/communicate.json", {"tasks": tasks})
    answer = models.rates(planted.evidence)
    assert answer.verdict == ANSWERED
    assert "at no rate below that of the text itself" in answer.found
    assert [row[1] for row in answer.tables[0].rows] == ["0.20", "1.60"]
    assert answer.tables[0].rows[1][4] == "-"
    row = dict(zip(answer.tables[0].header, answer.tables[0].rows[1], strict=True))
    assert row["bytes per text byte of the task"] == "17.7"
    assert [row[name].split()[0] for name in ("aligned right", "silent", "text")] == ["30.0%", "7.5%", "35.0%"]
    planted.stitch("compress-8x64", 0.7, keys=[MIDDLE])
    assert "more than half of the stitched loss is recovered" in models.rates(planted.evidence).found


def test_ratios_and_differences_are_of_the_same_documents(planted):
    """What makes a document hard cancels: maps that differ by a constant factor of the error have narrow intervals."""
    rng = np.random.default_rng(1)
    sst, hard = rng.uniform(50, 150, 30), rng.uniform(0.05, 0.6, 30)
    for name, factor in (("affine", 0.9), ("procrustes", 1.0)):
        sse = sst * hard * factor
        r2 = 1 - sse.sum() / sst.sum()
        planted.run(name, r2, keys=[MIDDLE])
        block = {"documents": list(range(30)), "n": [9] * 30, "sst": sst.tolist(), "sse": {"map": sse.tolist()}}
        planted.write(f"runs/{name}/documents.json", {"pairs": {MIDDLE: block}})
    evidence = planted.evidence
    ratio = evidence.ratio(("affine", MIDDLE), ("procrustes", MIDDLE))
    difference = evidence.difference(("affine", MIDDLE), ("procrustes", MIDDLE))
    alone = 1 - (sst * hard).sum() / sst.sum()
    error = 1 - alone
    assert ratio.value == pytest.approx((1 - 0.9 * error) / alone)
    assert difference.value == pytest.approx(0.1 * error)
    # By hand: draws of documents, both maps on the same ones.
    draws = rng.integers(0, 30, (4000, 30))
    errors = (sst * hard)[draws].sum(axis=1) / sst[draws].sum(axis=1)
    for found, wanted in ((ratio, (1 - 0.9 * errors) / (1 - errors)), (difference, 0.1 * errors)):
        low, high = np.quantile(wanted, [0.025, 0.975])
        assert (found.low, found.high) == (pytest.approx(low, rel=0.03), pytest.approx(high, rel=0.03))


def test_a_map_that_explains_nothing_is_no_measure(planted):
    planted.run("affine", 0.5, keys=[MIDDLE])
    planted.run("procrustes", -0.2, keys=[MIDDLE])
    assert planted.evidence.ratio(("affine", MIDDLE), ("procrustes", MIDDLE)) is None
    answer = maps.affine_beats_procrustes(planted.evidence)
    assert (answer.verdict, answer.tables) == (OPEN, [])
    assert "the Procrustes map explain" in answer.found


def test_an_expectation_holds_where_most_intervals_overlap_it():
    inside, under, over = Value(0.06), Value(0.01, 0.0, 0.02), Value(0.2, 0.1, 0.3)
    touching, reaching = Value(0.02, -0.01, 0.05), Value(0.1, 0.07, 0.2)
    assert judge([inside, under, over, touching, reaching], 0.05, 0.08) == Judged(3, 1, 1)
    verdicts = [
        Judged(*counts).verdict for counts in ((2, 1, 0), (1, 2, 0), (0, 1, 2), (1, 1, 1), (1, 1, 0), (0, 0, 0))
    ]
    assert verdicts == [HELD, LESS, MORE, PARTLY, PARTLY, OPEN]


def test_a_half_done_programme_answers_what_it_can(planted):
    planted.run("procrustes", 0.8)
    planted.run("affine", 0.85)
    answers = {answer.question: answer.verdict for answer in answer_all(planted.evidence)}
    assert answers["Does affine beat Procrustes by 5 to 8 %?"] == HELD
    assert answers["Does LoRA keep 90 to 95 % of the linear map?"] == OPEN
    rows = maps.affine_beats_procrustes(planted.evidence).tables[0].rows
    assert all(row[-1] == "-" for row in rows)
    assert all(len(first) == len(second) for first, second in pairwise(rows))
