"""Answers from planted results: a verdict follows from the figures, and says so where there are none."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest

from align.layers import LayerPair
from align.statistics import CONTRADICTED, SUPPORTED, UNDECIDED, Verdict
from align.training.stopping import stopping_epoch
from evaluate.communication.verdicts import beats_of, gain
from evaluate.reproduce.answers import answer_all, maps, models, tasks, training
from evaluate.reproduce.answers.base import ANSWERED, OPEN, all_of
from evaluate.reproduce.evidence import Evidence
from evaluate.reproduce.places import Places
from evaluate.reproduce.pooled import r2_quotient
from tests.support.tiers import tiered

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
        """A run of this R2 at every layer pair; documents differ by ``spread``, for every run in the same way."""
        rng = np.random.default_rng(0)
        sst = rng.uniform(50, 150, DOCUMENTS)
        noise = rng.uniform(-spread, spread, DOCUMENTS)
        sse = sst * (1 - r2 + noise - (sst * noise).sum() / sst.sum())
        figures = {"r2": r2, "r2_ci95": [r2 - spread, r2 + spread], "cka_debiased": 0.9, **test}
        entry = {"test": figures, "val": {"r2": r2}, "baselines": {}, "warnings": []}
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
        where = f"runs/{run}/{into}" if into else f"runs/{run}"
        self.write(f"{where}/stitch.json", {"pairs": dict.fromkeys(keys, entry)})
        sums = self.losses(recovered, beyond)
        self.write(f"{where}/stitch_documents.json", {"pairs": dict.fromkeys(keys, sums)})

    @staticmethod
    def losses(recovered, beyond):
        """Sums by document: clean 3 nats per token, the mean state 5, the token ``beyond`` above what is mapped."""
        rng = np.random.default_rng(1)
        tokens = rng.integers(60, 120, DOCUMENTS)
        mapped = 5 - 2 * recovered
        rates = {"clean": 3.0, "mapped": mapped, "token": mapped + beyond, "mean": 5.0, "shuffled": 5.5}
        # What is hard is so under every condition; each has a little of its own.
        hard = rng.normal(0, 0.2, DOCUMENTS)
        nats = {}
        for name, rate in rates.items():
            own = rng.normal(0, 0.005, DOCUMENTS)
            nats[name] = (tokens * (rate + hard + own - (own * tokens).sum() / tokens.sum())).tolist()
        return {"documents": list(range(DOCUMENTS)), "tokens": tokens.tolist(), "nats": nats}

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
    ("linear", "lora", "verdict"),
    [(0.8, 0.74, SUPPORTED), (0.8, 0.6, CONTRADICTED), (0.8, 0.808, CONTRADICTED), (0.8, 0.72, UNDECIDED)],
)
def test_what_lora_keeps(planted, linear, lora, verdict):
    planted.run("linear", linear)
    planted.run("lora", lora)
    answer = maps.lora_keeps(planted.evidence)
    assert answer.verdict == verdict
    assert f"It keeps {lora / linear:.1%} [" in answer.found
    assert f"mean over {len(KEYS)} layer pairs" in answer.found
    assert len(answer.tables[0].rows) == len(KEYS)
    # On the edge of the range no number of documents would do.
    assert answer.decided_by is None


@pytest.mark.parametrize(
    ("affine", "verdict"),
    [(0.85, SUPPORTED), (0.816, CONTRADICTED), (0.9, CONTRADICTED), (0.78, CONTRADICTED), (0.84, UNDECIDED)],
)
def test_what_affine_gains(planted, affine, verdict):
    planted.run("procrustes", 0.8)
    planted.run("affine", affine)
    answer = maps.affine_beats_procrustes(planted.evidence)
    assert answer.verdict == verdict
    assert f"{affine / 0.8 - 1:+.1%} [" in answer.found


def test_what_is_undecided_says_how_many_documents_would_decide_it(planted):
    planted.run("procrustes", 0.8, spread=0.0)
    planted.run("affine", 0.85, spread=0.06)
    answer = maps.affine_beats_procrustes(planted.evidence)
    assert answer.verdict == UNDECIDED, "6.2 % is in the range, its interval is wider"
    assert DOCUMENTS < answer.decided_by < 20 * DOCUMENTS
    block = answer.block()
    assert (block["decided_by"], block["unit"]) == (answer.decided_by, "test documents")


@pytest.mark.parametrize(("joint", "verdict"), [(0.9, SUPPORTED), (0.816, CONTRADICTED), (0.97, CONTRADICTED)])
def test_what_several_layers_gain(planted, joint, verdict):
    planted.run("affine", 0.8, cka_debiased=0.8)
    keys = [pair.key for _, pair in maps._joint(PLACES)]
    assert keys[0] == "a:8+16+24->b:8"
    assert keys[-1] == "b:8+16+24->a:24"
    planted.run("joint", joint, keys=keys, cka_debiased=0.9)
    answer = maps.multi_layer(planted.evidence)
    assert answer.verdict == verdict
    assert f"R2 changes by {joint / 0.8 - 1:+.1%} [" in answer.found
    assert "mean over 6 target layers" in answer.found
    assert answer.tables[0].rows[0][3] == "+12.5%"
    assert not any("at most" in words for words in answer.words)


def test_a_cka_near_one_leaves_no_room(planted):
    planted.run("affine", 0.8, cka_debiased=0.96)
    planted.run("joint", 0.8, keys=[pair.key for _, pair in maps._joint(PLACES)], cka_debiased=0.97)
    answer = maps.multi_layer(planted.evidence)
    assert answer.verdict == CONTRADICTED
    assert any("4.2% at most" in words for words in answer.words)


@pytest.mark.parametrize(
    ("losses", "early", "stops"),
    [
        ([1.0, 0.5, 0.4, 0.4, 0.4, 0.3], 1, "4"),
        # Stopping keeps the best epoch so far, not the last one.
        ([1.0, 0.5, 0.4, 0.45, 0.47, 0.3], 1, "4"),
        ([1.0, 0.5, 0.4, 0.3, 0.2, 0.1], 0, "not within 5"),
        # It waits for two epochs, the last of which is the last anyway.
        ([1.0, 0.5, 0.4, 0.3, 0.3, 0.3], 0, "5"),
    ],
)
def test_whether_ten_epochs_are_too_many(planted, losses, early, stops):
    planted.run("lora", 0.8)
    planted.epochs("lora", losses)
    answer = training.epochs(planted.evidence)
    assert answer.verdict == ANSWERED
    assert answer.found.startswith(f"For {early * len(KEYS)} of {len(KEYS)} trainings")
    row = dict(zip(answer.tables[0].header, answer.tables[0].rows[0], strict=True))
    assert row["stops after"] == stops
    assert row["last"] == f"{losses[-1]:.4f}"
    missed = 0.1 * early
    assert row["later epochs bring"] == f"{missed:.4f}"
    assert f"{missed:.4f} in the median" in answer.found


def test_some_trainings_stop_earlier_and_some_do_not(planted):
    planted.run("lora", 0.8)
    planted.epochs("lora", [1, 1, 1, 1])
    planted.run("affine-adamw", 0.8)
    planted.epochs("affine-adamw", [1.0, 0.9, 0.8, 0.7])
    assert training.epochs(planted.evidence).found.startswith(f"For {len(KEYS)} of {2 * len(KEYS)} trainings")


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


@pytest.mark.parametrize(("stitched", "costs"), [([5, 4, 3.5], "0.000"), ([3, 4, 5], "2.000")])
def test_whether_the_training_loss_says_anything_about_the_text(planted, stitched, costs):
    planted.run("lora-epochs", 0.8, keys=[MIDDLE])
    planted.epochs("lora-epochs", [0.3, 0.2, 0.1], keys=[MIDDLE], stitched=stitched)
    answer = training.in_the_model(planted.evidence)
    assert answer.verdict == ANSWERED
    assert f"costs {costs} nats per token" in answer.found
    assert [row[4] for row in answer.tables[0].rows] == [f"{nats:.3f}" for nats in stitched]
    last = answer.tables[0].rows[-1][-1]
    assert last.startswith("text 2 / of a model that")
    assert last.endswith("…")


@pytest.mark.parametrize(("adamw", "verdict"), [(0.798, SUPPORTED), (0.805, SUPPORTED), (0.77, CONTRADICTED)])
def test_whether_gradient_reaches_the_closed_form(planted, adamw, verdict):
    planted.run("affine", 0.8)
    planted.run("affine-adamw", adamw)
    answer = training.gradient(planted.evidence)
    assert answer.verdict == verdict
    assert f"{adamw - 0.8:+.4f}" in answer.tables[0].rows[0][3]


@pytest.mark.parametrize(
    ("last", "verdict"), [(-0.1, SUPPORTED), (0.4, CONTRADICTED), (0.0, UNDECIDED)], ids=["fails", "works", "level"]
)
def test_which_layers_work(planted, last, verdict):
    planted.run("procrustes", 0.8)
    planted.run("affine", 0.85)
    planted.stitch("affine", 0.9, beyond=0.4)
    block, sums = (
        json.loads((planted.out / f"runs/affine/{name}.json").read_text()) for name in ("stitch", "stitch_documents")
    )
    for key in block["pairs"]:
        if key.endswith(":32"):
            against = {"nats": last, "ci95": [last - 0.05, last + 0.05], "p": 0.9 if last <= 0 else 1e-4}
            block["pairs"][key] = block["pairs"][key] | {"beyond_token": against}
            sums["pairs"][key] = planted.losses(0.9, last)
        else:
            block["pairs"][key] = block["pairs"][key] | {"beyond_token": {"nats": 0.4, "ci95": [0.3, 0.5], "p": 1e-4}}
    planted.write("runs/affine/stitch.json", block)
    planted.write("runs/affine/stitch_documents.json", sums)
    metrics = json.loads((planted.out / "runs/affine/metrics.json").read_text())
    metrics["pairs"][MIDDLE] = metrics["pairs"][MIDDLE] | {"val": {"r2": 0.95}}
    planted.write("runs/affine/metrics.json", metrics)
    answer = maps.which_layers(planted.evidence)
    assert answer.verdict == verdict
    assert f"At the last layer they lower it by {last:+.3f} [" in answer.found.replace("-0.000", "+0.000")
    assert f"At {len(KEYS) - 2 * (last <= 0)} of {len(KEYS)} layer pairs" in answer.found
    # The layer to take is that of validation.
    assert "validation R2 is highest at a:16 → b:16, where it is +0.400" in answer.found
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
    assert "The bias changes R2 by +0.0100 [" in answer.found
    assert "rank 32 gives 95 % of the affine map's validation R2, and 96.3% [" in answer.words[0]
    ladder = dict(zip(answer.tables[1].header, answer.tables[1].rows[0], strict=True))
    assert (ladder["rank 8"], ladder["+ 8"], ladder["Procrustes"], ladder["affine"]) == (
        "0.600",
        "0.760",
        "0.700",
        "0.810",
    )


@pytest.mark.parametrize(
    ("r2", "recovered", "identical", "verdict"),
    [
        (1.0, 1.0, True, SUPPORTED),
        (0.9, 1.0, True, CONTRADICTED),
        (1.0, 0.9, True, CONTRADICTED),
        (1.0, 1.0, False, CONTRADICTED),
        (1.0, 0.98, True, UNDECIDED),
    ],
)
def test_the_ceiling(planted, r2, recovered, identical, verdict):
    for model in ("a", "b"):
        planted.run(f"self-{model}", r2, keys=[f"{model}:16->{model}:16"], spread=0.01 if r2 < 1 else 0.0)
        planted.stitch(f"self-{model}", recovered, keys=[f"{model}:16->{model}:16"], identical=identical)
    answer = models.ceiling(planted.evidence)
    assert answer.verdict == verdict
    assert len(answer.tables[0].rows) == 2


@pytest.mark.parametrize(
    ("procrustes", "affine", "verdict"),
    [(0.8, 0.8, SUPPORTED), (0.0, 0.8, SUPPORTED), (0.8, 0.0, UNDECIDED), (0.8, -0.3, CONTRADICTED)],
)
def test_whether_anything_beats_the_controls(planted, procrustes, affine, verdict):
    """What is judged is the affine map over all its layer pairs, and not whichever did best."""
    for run, beyond in (("procrustes", procrustes), ("affine", affine)):
        planted.run(run, 0.8)
        planted.stitch(run, 0.9, keys=[MIDDLE], beyond=beyond)
    answer = models.controls(planted.evidence)
    assert answer.verdict == verdict
    assert f"{affine:+.3f} [" in answer.found.replace("-0.000", "+0.000")
    assert "closest of 3 controls (token)" in answer.found
    assert f"Of the 2 stitched losses in the table {(procrustes > 0.05) + (affine > 0.05)} are below" in answer.found


def compared(alone, other=0, n=40):
    """A gain of 40 questions, by how many only one of the two gets right."""
    return gain(np.arange(n) < alone, np.arange(n) >= n - other, np.arange(n))


def talk(accuracies, gains, pair=MIDDLE, source="a"):
    """A part of ``communicate.json``; ``gains`` by mapped condition against each control."""
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
    told = {f"{condition} {pair}": against for condition, against in gains.items()}
    return {
        "source": source,
        "target": "b",
        "n": 40,
        "chance": 0.05,
        "chance_is": "always 'Italy'",
        "conditions": conditions,
        "gains": told,
        "beats": beats_of(told),
        "warnings": [],
    }


def level(alone, other=0):
    return {name: compared(alone, other) for name in ("silent", "random", "shuffled")}


@pytest.mark.parametrize(
    ("aligned", "replace", "verdict", "won"),
    [
        (level(12), level(12), SUPPORTED, 2),
        (level(12), level(4, 3), SUPPORTED, 1),
        # 4 to none of 40 is p 0.125, and 6 to none is p 0.03, of which there are two.
        (level(4), level(4), UNDECIDED, 0),
        (level(6), level(0), UNDECIDED, 0),
        (level(12) | {"random": compared(3, 3)}, level(0), UNDECIDED, 0),
        (level(0, 12), level(12) | {"silent": compared(0, 8)}, CONTRADICTED, 0),
    ],
)
def test_whether_states_tell_anything(planted, aligned, replace, verdict, won):
    accuracies = {"silent": 0.075, "text": 0.35, "aligned": 0.3, "replace": 0.1, "random": 0.05}
    gains = {"aligned": aligned, "replace": replace}
    planted.write("runs/affine/communicate.json", {"tasks": {"countries": talk(accuracies, gains)}})
    answer = tasks.communication(planted.evidence)
    assert answer.verdict == verdict
    assert answer.found.startswith(f"{won} of 2 ways to put the other model's states into a question beat")
    assert answer.unit == "questions"
    if verdict == UNDECIDED and aligned == level(4):
        # Of two ways the first has to reach 2.5 %: 7 to none, 2 * 0.5 ** 7 = 0.016, at a rate of 4 in 40.
        assert 65 <= answer.decided_by <= 75
    # A model with itself is the ceiling, not the answer.
    own = talk({**accuracies, "aligned": 0.35}, {"aligned": level(20)}, source="b")
    both = {"countries": talk(accuracies, gains), "countries (b->b)": own}
    planted.write("runs/affine/communicate.json", {"tasks": both})
    again = tasks.communication(planted.evidence)
    assert (again.found, again.verdict) == (answer.found, verdict)
    # What is quoted was named before anybody knew which way would be right most often.
    assert "countries: aligned a:16 → b:16, 30% [20%, 40%] right; told nothing 8% [-3%, 18%]; with" in answer.words[0]
    assert again.words[1].startswith("The ceiling, b with itself: aligned a:16 → b:16, 35%")
    assert [row[0] for row in answer.tables[0].rows] == ["silent", "text", "replace", "aligned", "random"]
    [row] = [row for row in answer.tables[0].rows if row[0] == "aligned"]
    counts = aligned["silent"]
    assert row[4].endswith(f"({counts['first_alone']}:{counts['second_alone']})")


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
    assert "the rates below that of the text itself recover less than half (1)" in answer.found
    assert [row[1] for row in answer.tables[0].rows] == ["0.20", "1.60"]
    assert answer.tables[0].rows[1][4] == "-"
    row = dict(zip(answer.tables[0].header, answer.tables[0].rows[1], strict=True))
    assert row["bytes per text byte of the task"] == "17.7"
    assert [row[name].split()[0] for name in ("aligned right", "silent", "text")] == ["30.0%", "7.5%", "35.0%"]
    planted.stitch("compress-8x64", 0.7, keys=[MIDDLE])
    assert "recover more than half (1)" in models.rates(planted.evidence).found
    planted.stitch("compress-8x64", 0.52, keys=[MIDDLE])
    assert "recover perhaps half (1)" in models.rates(planted.evidence).found


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
    assert answer.verdict == OPEN
    assert answer.tables[0].rows[0][4] == "-"
    assert "the Procrustes map explain" in answer.found


def test_claims_hold_together_or_not_at_all():
    yes, no = Verdict(SUPPORTED, None), Verdict(CONTRADICTED, None)
    perhaps, more, never = (Verdict(UNDECIDED, count) for count in (30, 50, None))
    assert all_of([yes, yes]) == yes
    assert all_of([yes, no, perhaps]) == no
    assert all_of([yes, perhaps, more]) == more
    assert all_of([perhaps, never]) == never


def independent(rng, documents, kept):
    """Sums of two runs at every layer pair: the first keeps a share of the R2 of the second."""
    n = rng.integers(50, 400, documents)
    hard = rng.uniform(0.2, 0.6, documents)
    runs = {"lora": {}, "linear": {}}
    for key in KEYS:
        explained = 1 - hard + rng.normal(0, 0.05, documents)
        for run, share in (("lora", kept), ("linear", 1.0)):
            # What a map makes of a document beside what all make of it.
            r2 = share * explained + rng.normal(0, 0.03, documents)
            sse = (n * np.maximum(1 - r2, 0.0)).tolist()
            runs[run][key] = {
                "documents": list(range(documents)),
                "n": n.tolist(),
                "sst": n.tolist(),
                "sse": {"map": sse},
            }
    return runs


@pytest.mark.parametrize(("documents", "times"), tiered([(6, 60)], [(3, 500), (6, 1000), (30, 500)]))
def test_a_true_85_percent_is_hardly_ever_90_to_95(planted, documents, times):
    """Where an overlapping interval was enough, it was upheld in 64 of 100 runs of six documents."""
    rng = np.random.default_rng(documents)
    planted.run("linear", 0.6)
    planted.run("lora", 0.5)
    verdicts = []
    for _ in range(times):
        for run, pairs in independent(rng, documents, 0.85).items():
            planted.write(f"runs/{run}/documents.json", {"pairs": pairs})
        verdicts.append(maps.lora_keeps(planted.evidence).verdict)
    assert verdicts.count(SUPPORTED) <= 0.01 * times
    if documents >= 6:
        assert verdicts.count(CONTRADICTED) > 0.3 * times


@pytest.mark.parametrize(("documents", "times"), tiered([(6, 60)], [(3, 500), (6, 1000), (30, 500)]))
def test_verdicts_are_rarely_wrong_at_the_edge(planted, documents, times):
    """A true 90 % lies on the edge of the range: either verdict is wrong half of the time it is given, 2.5 % each."""
    rng = np.random.default_rng(100 + documents)
    planted.run("linear", 0.6)
    planted.run("lora", 0.5)
    verdicts, covered, without = [], 0, 0
    for _ in range(times):
        for run, pairs in independent(rng, documents, 0.9).items():
            planted.write(f"runs/{run}/documents.json", {"pairs": pairs})
        evidence = planted.evidence
        verdicts.append(maps.lora_keeps(evidence).verdict)
        estimate = r2_quotient(evidence, *([(run, key) for key in KEYS] for run in ("lora", "linear")))
        # Of three unequal documents one may hold nearly everything: then there is no interval, and no verdict.
        if estimate.interval is None:
            without += 1
            assert verdicts[-1] not in (SUPPORTED, CONTRADICTED)
        else:
            covered += estimate.low <= 0.9 <= estimate.high
    assert without <= (0.5 * times if documents < 6 else 0)
    spread = 3 * np.sqrt(0.05 * 0.95 / (times - without))
    assert covered / (times - without) >= 0.95 - spread - 0.02
    assert (verdicts.count(SUPPORTED) + verdicts.count(CONTRADICTED)) / times <= 0.05 + spread + 0.02


def test_documents_that_a_layer_pair_lacks_add_nothing_to_it(planted):
    """Pooled figures are of all documents; one of which a direction has no rows counts for nothing there."""
    rng = np.random.default_rng(3)
    runs = independent(rng, 12, 0.9)
    planted.run("linear", 0.6)
    planted.run("lora", 0.5)
    places = [[(run, key) for key in KEYS] for run in ("lora", "linear")]
    for run, pairs in runs.items():
        planted.write(f"runs/{run}/documents.json", {"pairs": pairs})
    whole = r2_quotient(planted.evidence, *places)
    for run, pairs in runs.items():
        last = pairs[KEYS[-1]]
        short = {name: last[name][:-1] for name in ("documents", "n", "sst")} | {
            "sse": {"map": last["sse"]["map"][:-1]}
        }
        planted.write(f"runs/{run}/documents.json", {"pairs": pairs | {KEYS[-1]: short}})
    found = r2_quotient(planted.evidence, *places)
    assert found.documents == whole.documents == 12
    assert found.value != whole.value
    r2 = {
        run: np.mean([
            1 - np.sum(block["sse"]["map"][: 12 - (key == KEYS[-1])]) / np.sum(block["sst"][: 12 - (key == KEYS[-1])])
            for key, block in pairs.items()
        ])
        for run, pairs in runs.items()
    }  # fmt: skip
    assert found.value == pytest.approx(r2["lora"] / r2["linear"])


def test_a_half_done_programme_answers_what_it_can(planted):
    planted.run("procrustes", 0.8)
    planted.run("affine", 0.85)
    answers = {answer.question: answer.verdict for answer in answer_all(planted.evidence)}
    assert answers["Does affine beat Procrustes by 5 to 8 %?"] == SUPPORTED
    assert answers["Does LoRA keep 90 to 95 % of the linear map?"] == OPEN
    rows = maps.affine_beats_procrustes(planted.evidence).tables[0].rows
    assert all(row[-1] == "-" for row in rows)
    assert all(len(first) == len(second) for first, second in pairwise(rows))
