"""The whole programme on two tiny models: through the commands themselves, interrupted, continued, analysed."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from align.statistics import CONTRADICTED, SUPPORTED, UNDECIDED
from align.training.stopping import stopping_epoch
from evaluate.reproduce import Corpus, Scale, analysis, reproduce
from evaluate.reproduce.answers import QUESTIONS
from evaluate.reproduce.answers.base import ANSWERED, OPEN
from evaluate.reproduce.places import places
from evaluate.reproduce.running import Record, carry_out
from evaluate.reproduce.whole import plan
from featstore.errors import SpecError
from featstore.runtime.subcommands import StageError, run_stage
from featstore.store import open_store
from tests.support.commands import call, command_environment, command_line

SCALE = Scale("120", 4, ("lookup:2",), 2, (1, 8), ((1, 4), (2, 8)))
OPTIONS = ("--stitch-tokens", 120, "--examples", 4, "--task", "lookup:2", "--epochs", 2, "--ranks", "1,8")
OPTIONS = (*OPTIONS, "--latents", "1x4,2x8")


def in_process(calls):
    """A runner that does what `run_stage` does, without the seconds a new interpreter takes."""

    def run(tool, *arguments):
        calls.append((tool, *arguments))
        main = importlib.import_module(f"{tool}.cli").main
        code, out = 0, io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
            patch.setattr(sys, "argv", [tool, *arguments, "--json"])
            try:
                main()
            except SystemExit as stop:
                code = int(stop.code or 0)
        if code:
            raise StageError(f"stage failed with exit code {code}: {tool} {' '.join(arguments)}")
        return json.loads(out.getvalue())

    return run


@pytest.fixture(scope="module")
def programme(tiny_store, tmp_path_factory):
    """The finished programme of two models of different depth."""
    out, calls = tmp_path_factory.mktemp("reproduce") / "out", []
    with pytest.MonkeyPatch.context() as patch:
        # Half of the time would go into the steps of two compressed maps of random models.
        patch.setattr("align.compress.fit.EPOCH_STEPS", 6)
        result = reproduce(out, SCALE, store=tiny_store, corpus=Corpus(), workers=1, run=in_process(calls))
    return SimpleNamespace(out=out, result=result, calls=calls, store=tiny_store)


def test_every_step_is_done_and_every_question_answered(programme):
    assert programme.result["failed"] == {}
    assert len(programme.result["answers"]) == len(QUESTIONS)
    verdicts = {a["question"]: a["verdict"] for a in programme.result["answers"]}
    assert OPEN not in verdicts.values()
    assert set(verdicts.values()) <= {SUPPORTED, CONTRADICTED, UNDECIDED, ANSWERED}
    assert not any("not done" in a["found"] for a in programme.result["answers"])
    assert set(programme.result["seconds"]) == set(json.loads((programme.out / "steps.json").read_text())["steps"])
    tools = [call[:2] for call in programme.calls]
    assert {("evaluate", name) for name in ("stitch", "generate", "communicate", "report")} <= set(tools)


def test_the_analysis_says_only_what_the_files_say(programme):
    text = (programme.out / "ANALYSIS.md").read_text()
    for answer in programme.result["answers"]:
        assert answer["question"] in text
        assert f"Verdict: **{answer['verdict']}**" in text
    assert "There is no interval: an interval needs at least 3 test documents, not 2" in text
    affine = json.loads((programme.out / "runs/affine/metrics.json").read_text())["pairs"]
    stitched = json.loads((programme.out / "runs/affine/stitch.json").read_text())["pairs"]
    assert set(affine) == set(stitched)
    for key, entry in affine.items():
        # Two test documents make no interval.
        assert entry["test"]["r2_ci95"] is None
        assert f"| {entry['test']['r2']:.3f} |" in text
        assert key.replace("->", " → ") in text
    talk = json.loads((programme.out / "runs/affine/communicate.json").read_text())["tasks"]
    # Both directions, and both models with themselves.
    assert len(talk) == 4
    assert all(f"{task}: 4 questions" in text for task in talk)
    assert {entry["source"] for entry in talk.values()} == {"llama", "mistral"}
    assert "None" not in text
    assert "nan" not in re.sub(r"\bnan\w", "", text)


def test_models_that_are_left_out_are_named(programme, monkeypatch):
    store = open_store(programme.store)
    pairs = places(store)
    assert "Not compared" not in analysis._head(store, pairs)
    monkeypatch.setattr(store, "models", [*store.models, "third"])
    assert "takes the store's first two: third." in analysis._head(store, pairs)


def test_what_the_analysis_links_to_is_there(programme):
    text = (programme.out / "ANALYSIS.md").read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert {"layers.png", "ranks.png", "rates.png"} <= set(links)
    for link in links:
        assert (programme.out / link).is_file(), link
    headings = {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    anchors = re.findall(r"\(#([^)]+)\)", text)
    assert len(anchors) == len(QUESTIONS)
    assert set(anchors) <= headings


def test_the_tables_are_tables(programme):
    blocks = re.findall(r"(?:^\|.*\n)+", (programme.out / "ANALYSIS.md").read_text(), flags=re.MULTILINE)
    assert len(blocks) > len(QUESTIONS)
    for block in blocks:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block


def test_the_same_command_does_nothing_twice(programme, capsys):
    before = {path: path.stat().st_mtime_ns for path in programme.out.glob("runs/**/*") if path.is_file()}
    calls = []
    again = reproduce(programme.out, SCALE, store=programme.store, corpus=Corpus(), workers=1, run=in_process(calls))
    assert [call[1] for call in calls] == ["report"]
    assert again["answers"] == programme.result["answers"]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_other_options_are_refused_before_anything_runs(programme):
    with pytest.raises(SpecError, match=r"holds step .* of another command"):
        reproduce(
            programme.out,
            Scale("240", 4, ("lookup:2",), 2, (1, 8), ((1, 4), (2, 8))),
            store=programme.store,
            corpus=Corpus(),
            workers=1,
            run=in_process([]),
        )


def test_a_damaged_result_is_made_again(programme):
    path = programme.out / "runs/lora/stitch.json"
    before = json.loads(path.read_text())
    path.unlink()
    calls = []
    reproduce(programme.out, SCALE, store=programme.store, corpus=Corpus(), workers=1, run=in_process(calls))
    assert [call[1] for call in calls] == ["stitch", "report"]
    assert json.loads(path.read_text()) == before


@pytest.mark.thorough
def test_a_killed_programme_goes_on(programme, tmp_path):
    """The command itself, killed while it works, and then carried on to the same figures."""
    out = tmp_path / "out"
    words = ["--store", programme.store, "--out", out, *OPTIONS, "--workers", 1]
    command = command_line("evaluate", "reproduce", *words)
    process = subprocess.Popen(
        command, env=command_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 240
    while not (out / "runs/procrustes/adapter.json").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # The whole session: its steps are processes of their own.
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = json.loads((out / "steps.json").read_text())["steps"]
    assert 1 <= len(done) <= 4
    # The same steps, as far as the affine maps; the others are in `programme`.
    steps = plan(open_store(programme.store), programme.store, out, SCALE)
    steps = steps[: [step.name for step in steps].index("affine") + 1]
    calls = []
    assert carry_out(steps, Record(out), out, run=in_process(calls)) == {}
    types = [words[words.index("--type") + 1] for words in calls if "--type" in words]
    assert "procrustes" not in types
    assert types[-1] == "affine"
    assert "cka" not in {words[1] for words in calls}
    # What was fitted does not depend on the interruption.
    for run in (*types, "procrustes"):
        first, second = (json.loads((where / f"runs/{run}/metrics.json").read_text()) for where in (programme.out, out))
        assert first == second


def test_the_commands_are_listed_without_running(programme, capsys, tmp_path):
    listed = call(
        capsys,
        "evaluate",
        "reproduce",
        "--store",
        programme.store,
        "--out",
        tmp_path / "x",
        "--dry-run",
        *OPTIONS,
        "--json",
    ).json
    assert listed["complete"]
    recorded = json.loads((programme.out / "steps.json").read_text())["steps"]
    assert {entry["step"] for entry in listed["commands"]} == set(recorded)
    assert [entry["command"].split()[0] for entry in listed["commands"]][:2] == ["align", "align"]
    assert not (tmp_path / "x").exists()


def test_without_a_store_the_first_command_makes_one(capsys, tmp_path):
    models = ("--model", "a=org/one", "--model", "b=org/two")
    listed = call(
        capsys, "evaluate", "reproduce", *models, "--max-tokens", "1M", "--out", tmp_path, "--dry-run", "--json"
    ).json
    assert not listed["complete"]
    [extract] = listed["commands"]
    assert extract["command"].startswith(
        "featstore extract --model a=org/one --model b=org/two --max-tokens 1M --layers 0%,"
    )
    text = call(capsys, "evaluate", "reproduce", "--out", tmp_path, "--dry-run").out
    assert "twin" in text
    assert "depend on the store" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--ranks", "2,x"), "--ranks '2,x': write numbers from 1"),
        (("--ranks", "0"), "--ranks '0'"),
        (("--latents", "8"), "--latents '8': write LATENTSxWIDTH"),
        (("--latents", "0x8"), "both numbers must be 1 or more"),
        (("--task", "riddles"), "riddles"),
        (("--stitch-tokens", "many"), "many"),
        (("--model", "a=one"), "connects two models, not 1"),
        (("--store", "STORE", "--max-tokens", "9"), "leave them out with --store"),
        (("--store", "nowhere.zarr"), "nowhere.zarr"),
    ],
)
def test_wrong_input_is_refused_in_one_line(programme, capsys, tmp_path, words, said):
    words = [programme.store if word == "STORE" else word for word in words]
    assert said in call(capsys, "evaluate", "reproduce", "--out", tmp_path / "out", *words).refusal
    assert not (tmp_path / "out" / "runs").exists()


@pytest.mark.parametrize(("patience", "min_delta"), [(1, 0.001), (2, 0.02), (3, 0.3), (9, 0.0)])
def test_early_stopping_is_read_off_a_curve_as_the_loop_does_it(programme, tmp_path, capsys, patience, min_delta):
    options = ("--type", "affine", "--solver", "adamw", "--epochs", 5, "--lr", 0.02, "--tracker", "none")
    options = (*options, "--patience", patience, "--min-delta", min_delta, "--layers", 2)
    run = tmp_path / "run"
    call(capsys, "align", "train", "--store", programme.store, *options, "--out", run, "--json")
    [entry] = json.loads((run / "metrics.json").read_text())["pairs"].values()
    records = [
        json.loads((run / f"eval_epoch_{n}.json").read_text()) for n in range(len(list(run.glob("eval_epoch_*"))))
    ]
    losses = [next(iter(record["pairs"].values()))["val_loss"] for record in records]
    stopped = re.match(r"stopped at epoch (\d+)", entry["fit"])
    expected = int(stopped[1]) if stopped else None
    assert stopping_epoch(losses, patience=patience, min_delta=min_delta) == expected
    assert stopped is None or expected == len(losses) - 1


def test_a_stage_that_fails_says_which(tmp_path):
    with pytest.raises(StageError, match=r"exit code 2: align compare .*nowhere"):
        run_stage("align", "compare", str(tmp_path / "nowhere"))
