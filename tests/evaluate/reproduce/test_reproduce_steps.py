"""The programme's bookkeeping: what is done stays done, what fails is said, and nothing of another command is taken."""

from __future__ import annotations

import json
import os
import runpy
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.layers import LayerPair
from evaluate.reproduce.places import LAYERS, Places
from evaluate.reproduce.programme import Scale, Step, programme
from evaluate.reproduce.running import DONE, FAILED, RECORD, RUNNING, WAITING, Record, carry_out
from featstore.errors import SpecError
from featstore.models.references import parse_layers
from featstore.runtime.subcommands import StageError
from tests.support import ROOT

FIT = Step(
    "fit", "align", ("train", "--out", "OUT/runs/fit"), ("runs/fit/metrics.json", "runs/fit/adapter.json"), fits=True
)
STITCH = Step("stitch fit", "evaluate", ("stitch", "--adapter", "OUT/runs/fit"), ("runs/fit/stitch.json",), ("fit",))
OTHER = Step("other", "align", ("cka",), ("runs/cka/cka.json",))


def maker(out, calls, *, fails=(), without=()):
    """A runner that makes what a step promises."""
    steps = {step.arguments: step for step in (FIT, STITCH, OTHER)}

    def run(tool, *arguments):
        calls.append((tool, *arguments))
        step = steps.get(arguments, FIT)
        if step.name in fails:
            raise StageError(f"stage failed with exit code 2: {step.name}")
        for made in step.makes:
            if step.name not in without:
                (out / made).parent.mkdir(parents=True, exist_ok=True)
                (out / made).write_text("{}")

    return run


def test_steps_run_once_and_only_what_is_missing_runs_again(tmp_path):
    calls = []
    run = maker(tmp_path, calls)
    assert carry_out([FIT, STITCH, OTHER], Record(tmp_path), tmp_path, run=run) == {}
    assert [call[0] for call in calls] == ["align", "evaluate", "align"]
    assert carry_out([FIT, STITCH, OTHER], Record(tmp_path), tmp_path, run=run) == {}
    assert len(calls) == 3
    (tmp_path / "runs/fit/stitch.json").unlink()
    carry_out([FIT, STITCH, OTHER], Record(tmp_path), tmp_path, run=run)
    assert calls[3:] == [(STITCH.tool, *STITCH.arguments)]
    entry = json.loads((tmp_path / RECORD).read_text())["steps"]["fit"]
    assert entry["status"] == DONE
    assert entry["seconds"] >= 0


def test_a_failure_stops_what_needs_it_and_nothing_else(tmp_path):
    calls = []
    failed = carry_out([FIT, STITCH, OTHER], Record(tmp_path), tmp_path, run=maker(tmp_path, calls, fails={"fit"}))
    assert set(failed) == {"fit", "stitch fit"}
    assert "exit code 2" in failed["fit"]
    assert failed["stitch fit"] == "it needs 'fit', which is not done"
    assert [call[1] for call in calls] == ["train", "cka"]
    states = {name: entry["status"] for name, entry in json.loads((tmp_path / RECORD).read_text())["steps"].items()}
    assert states == {"fit": FAILED, "stitch fit": WAITING, "other": DONE}
    # Mended, the same command does what is left.
    assert carry_out([FIT, STITCH, OTHER], Record(tmp_path), tmp_path, run=maker(tmp_path, calls)) == {}
    assert [call[1] for call in calls[2:]] == ["train", "stitch"]


def test_a_step_that_leaves_nothing_behind_has_failed(tmp_path):
    failed = carry_out([OTHER], Record(tmp_path), tmp_path, run=maker(tmp_path, [], without={"other"}))
    assert failed == {"other": "it left no runs/cka/cka.json"}


@pytest.mark.parametrize(("step", "again"), [(FIT, 0), (STITCH, 1)])
def test_what_was_whole_when_the_process_died_is_taken_only_where_its_last_file_says_so(tmp_path, step, again):
    def killed(tool, *arguments):
        maker(tmp_path, [])(tool, *arguments)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out([step], Record(tmp_path), tmp_path, run=killed)
    assert Record(tmp_path).of(step)["status"] == RUNNING
    calls = []
    carry_out([step], Record(tmp_path), tmp_path, run=maker(tmp_path, calls))
    assert len(calls) == again


def test_a_fit_without_its_card_is_done_again(tmp_path):
    Record(tmp_path).note(FIT, RUNNING)
    (tmp_path / "runs/fit").mkdir(parents=True)
    (tmp_path / "runs/fit/metrics.json").write_text("{}")
    calls = []
    carry_out([FIT], Record(tmp_path), tmp_path, run=maker(tmp_path, calls))
    assert len(calls) == 1


def test_results_of_another_command_are_not_taken(tmp_path):
    carry_out([FIT], Record(tmp_path), tmp_path, run=maker(tmp_path, []))
    other = Step("fit", "align", ("train", "--rank", "9"), FIT.makes, fits=True)
    with pytest.raises(SpecError, match=r"holds step 'fit' of another command .*choose another --out"):
        carry_out([other], Record(tmp_path), tmp_path, run=maker(tmp_path, []))


def test_a_failed_step_may_be_tried_with_other_options(tmp_path):
    carry_out([FIT], Record(tmp_path), tmp_path, run=maker(tmp_path, [], fails={"fit"}))
    calls = []
    other = Step("fit", "align", ("train", "--rank", "9"), FIT.makes, fits=True)
    assert carry_out([other], Record(tmp_path), tmp_path, run=maker(tmp_path, calls)) == {}
    assert len(calls) == 1


def test_the_directory_may_be_moved(tmp_path):
    first = tmp_path / "first"
    first.mkdir()
    step = Step("other", "align", ("cka", "--out", str(first / "runs/cka")), OTHER.makes)
    carry_out([step], Record(first), first, run=lambda *_: maker(first, [])("align", "cka"))
    second = tmp_path / "second"
    first.rename(second)
    moved = Step("other", "align", ("cka", "--out", str(second / "runs/cka")), OTHER.makes)
    calls = []
    assert carry_out([moved], Record(second), second, run=maker(second, calls)) == {}
    assert calls == []


def test_only_paths_below_the_directory_are_free_of_it(tmp_path):
    out = tmp_path / "a"
    out.mkdir()
    words = ("train", "--rank", "a", f"{out}", f"{out}-b/c", f"{out}/runs/a")
    [tool, *command] = Record(out).of(Step("x", "align", words, ()))["command"]
    assert [tool, *command] == ["align", "train", "--rank", "a", f"{out}", f"{out}-b/c", "OUT/runs/a"]


def test_an_interrupted_training_goes_on_from_its_checkpoint(tmp_path):
    run = tmp_path / "runs/fit"
    (run / "checkpoints").mkdir(parents=True)
    calls = []
    (run / "run.yaml").write_text("")
    carry_out([FIT], Record(tmp_path), tmp_path, run=maker(tmp_path, calls))
    assert calls[-1] == ("align", *FIT.arguments)
    for made in FIT.makes:
        (tmp_path / made).unlink()
    (run / "checkpoints" / "1").write_text("")
    carry_out([FIT], Record(tmp_path), tmp_path, run=maker(tmp_path, calls))
    assert calls[-1] == ("align", "train", "--resume", "--out", str(run))


@pytest.mark.parametrize("text", ["[]", "{}", "nonsense", '{"steps": {"fit": 1}}'])
def test_a_damaged_record_is_refused(tmp_path, text):
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(SpecError, match=r"steps\.json is not a record of steps .*remove it"):
        Record(tmp_path)


def made_places(depths, layers):
    pairs = tuple(LayerPair("a", (x,), "b", y) for x, y in zip(*layers, strict=True))
    return Places("a", "b", {"a": depths[0], "b": depths[1]}, pairs)


@given(st.integers(2, 200), st.integers(2, 200))
def test_layers_are_written_so_that_both_models_mean_them(first, second):
    depths = (first, second)
    layers = [parse_layers([LAYERS], {"m": depth})["m"] for depth in depths]
    if len(layers[0]) != len(layers[1]):
        return
    places = made_places(depths, layers)
    for pair in places.pairs:
        written = places.text([pair])
        assert parse_layers([written], {"m": first})["m"] == (pair.source_layer,)
        assert parse_layers([written], {"m": second})["m"] == (pair.target_layer,)


def test_the_depths_of_the_original_and_their_equivalents():
    assert parse_layers([LAYERS], {"m": 32})["m"] == (0, 8, 12, 16, 20, 24, 32)
    places = made_places((32, 30), (parse_layers([LAYERS], {"m": 32})["m"], parse_layers([LAYERS], {"m": 30})["m"]))
    assert places.middle.key == "a:16->b:15"
    assert [pair.key for pair in places.inner] == ["a:8->b:8", "a:16->b:15", "a:24->b:23"]
    assert places.text(places.inner) == "8,50%,75%"


def test_layers_that_no_depth_names_are_refused():
    with pytest.raises(SpecError, match=r"layers 3 of 'a' and 20 of 'b' lie at different depths; .*extract --layers"):
        made_places((32, 32), ((3, 8), (20, 8))).text([LayerPair("a", (3,), "b", 20)])


def all_steps(tmp_path, scale=None, widths=(64, 48)):
    places = made_places((32, 32), ((0, 8, 12, 16, 20, 24, 32),) * 2)
    return programme(tmp_path / "s.zarr", tmp_path, places, scale or Scale(), widths)


def test_the_programme_has_everything_that_was_planned(tmp_path):
    steps = {step.name: step for step in all_steps(tmp_path)}
    types = {step.arguments[step.arguments.index("--type") + 1] for step in steps.values() if step.fits}
    assert types == {"procrustes", "linear", "affine", "reduced-rank", "lora", "compress"}
    for name in ("procrustes", "linear", "affine", "joint", "lora", "affine-adamw"):
        assert "--both" in steps[name].arguments
    assert "--joint" in steps["joint"].arguments
    assert "--eval-models" in steps["lora-epochs"].arguments
    assert steps["lora"].arguments[steps["lora"].arguments.index("--patience") + 1] == "10"
    assert {"self-a", "self-b", "generate affine", "communicate affine", "stitch affine hidden"} <= set(steps)
    assert "--itself" in steps["communicate affine"].arguments
    for step in steps.values():
        assert all(need in steps for need in step.needs)
        assert list(steps).index(step.name) > max((list(steps).index(need) for need in step.needs), default=-1)
    assert len({made for step in steps.values() for made in step.makes}) == sum(len(s.makes) for s in steps.values())


def test_roles_are_those_of_every_fit_and_comparison(tmp_path):
    steps = all_steps(tmp_path, Scale(roles="user,assistant"))
    of_roles = [step.name for step in steps if "--roles" in step.arguments]
    assert of_roles == [step.name for step in steps if step.tool == "align"]
    for step in steps:
        if step.tool == "align":
            assert step.arguments[step.arguments.index("--roles") + 1] == "user,assistant"
    assert not any("--roles" in step.arguments for step in all_steps(tmp_path))


def test_ranks_that_are_no_restriction_are_left_out(tmp_path):
    names = [step.name for step in all_steps(tmp_path, Scale(ranks=(8, 23, 24)))]
    assert [name for name in names if name.startswith("rank-")] == [
        "rank-8", "rank-8-on-procrustes", "rank-23", "rank-23-on-procrustes",
    ]  # fmt: skip


def test_the_cost_elsewhere_is_counted_from_the_programme(monkeypatch, capsys):
    """The figures of docs/reproducing.md; seven layers of two models are 8 KiB a token each."""
    script = ROOT / "benchmarks" / "expected_cost.py"
    told = {}
    for tokens in ("1e6", "2e6"):
        monkeypatch.setattr(sys, "argv", [str(script), "--tokens", tokens])
        runpy.run_path(str(script), run_name="__main__")
        told[tokens] = capsys.readouterr().out
    assert "115 GB" in told["1e6"]
    assert "maps of all runs (float32)         9.13 GB" in told["1e6"]
    assert "all of it, nothing overlapping     64 min" in told["1e6"]
    assert "229 GB" in told["2e6"]
    assert "assumed, not measured" in told["1e6"]


def test_two_commands_run_side_by_side_and_what_needs_one_waits_for_it(tmp_path):
    calls, both = [], threading.Barrier(2, timeout=60)
    make = maker(tmp_path, calls)

    def run(tool, *arguments):
        # The fit and what stands behind the step that needs it only pass this together.
        if arguments in (FIT.arguments, OTHER.arguments):
            both.wait()
        elif arguments == STITCH.arguments:
            assert (tmp_path / FIT.makes[-1]).is_file()
        assert os.environ["OMP_NUM_THREADS"].isdecimal()
        make(tool, *arguments)

    threads = os.environ.get("OMP_NUM_THREADS")
    assert carry_out([FIT, STITCH, OTHER], Record(tmp_path), tmp_path, run=run, workers=2) == {}
    assert sorted(call[1] for call in calls) == ["cka", "stitch", "train"]
    assert os.environ.get("OMP_NUM_THREADS") == threads


def test_side_by_side_a_failure_stops_what_needs_it_and_nothing_else(tmp_path):
    run = maker(tmp_path, [], fails={"fit"})
    failed = carry_out([FIT, STITCH, OTHER], Record(tmp_path), tmp_path, run=run, workers=3)
    assert set(failed) == {"fit", "stitch fit"}
    assert Record(tmp_path).is_done(OTHER)
