"""Sweeps: which runs a grid comes to, what is skipped, done again and recorded, and what survives a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import align.runs.train
import align.sweeps.sweep
import align.training.loop
from align.execution.options import Execution
from align.runs.candidates import Maker
from align.settings import LoopSettings, Settings
from align.sweeps.sweep import Cell, Grid, cells, describe, groups, parse_grid, run_cell, run_together, sweep
from featstore.errors import SpecError, StoreNotFoundError
from featstore.runtime.provenance import read_json
from featstore.store import open_store
from tests.support.planted import Planted, plant, rotation, spectrum_rows


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    x = {k: spectrum_rows(1200, 8, k) for k in (1, 2)}
    y = {k: x[k] @ rotation(8, k) + 0.2 * spectrum_rows(1200, 8, k + 5) for k in (1, 2)}
    return plant(tmp_path_factory.mktemp("sweep") / "s.zarr", x, y)


@pytest.fixture
def settings(planted: Planted) -> Settings:
    return Settings(str(planted.path), loop=LoopSettings(skip="none", rank=2))


@pytest.fixture(scope="module")
def here() -> Iterator[Execution]:
    """A scheduler within this process, where patches work and nothing has to start."""
    from distributed import Client

    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address="127.0.0.1:0") as client:
        yield Execution(scheduler=client.scheduler.address)


def statuses(result: dict[str, Any]) -> dict[str, str]:
    return {cell["name"]: cell["status"] for cell in result["cells"]}


class TestGrid:
    def test_options_become_values(self) -> None:
        grid = parse_grid(
            types="procrustes, lora,compress",
            ranks="8,32",
            formats="int8,fp8",
            layers="8; 16,24;0%",
            latents="8",
            latent_dims="16,64",
        )
        assert grid == Grid(
            ("procrustes", "lora", "compress"), (8, 32), ("int8", "fp8"), ("8", "16,24", "0%"), (8,), (16, 64)
        )
        assert parse_grid() == Grid()

    @pytest.mark.parametrize(
        ("option", "value", "words"),
        [
            ("types", "procrustes,magic", ("--types 'magic'", "choose among")),
            ("types", "lora,,affine", ("--types 'lora,,affine'",)),
            ("types", "", ("--types ''",)),
            ("ranks", "8,-1", ("--ranks '-1'", "positive whole numbers")),
            ("ranks", "0", ("--ranks '0'",)),
            ("ranks", "8,8", ("8 stands there twice",)),
            ("ranks", "9999999999", ("--ranks '9999999999'",)),
            ("ranks", "²", ("--ranks '²'",)),
            ("latents", "x", ("--latents 'x'",)),
            ("latent_dims", "1.5", ("--latent-dims '1.5'",)),
            ("formats", "int4", ("int4",)),
            ("layers", "8;;9", ("--layers '8;;9'", "';'")),
        ],
    )
    def test_what_does_not_parse_is_refused(self, option: str, value: str, words: tuple[str, ...]) -> None:
        with pytest.raises(SpecError) as refused:
            parse_grid(**{option: value})
        assert [word for word in words if word not in str(refused.value)] == []

    def test_an_axis_multiplies_the_types_that_have_it(self, settings: Settings) -> None:
        grid = Grid(("procrustes", "lora", "compress"), (8, 32), ("int8",), (), (4, 8), (16,))
        assert [cell.name for cell in cells(settings, grid)] == [
            "procrustes-int8", "lora-r8-int8", "lora-r32-int8", "compress-m4-d16-int8", "compress-m8-d16-int8",
        ]  # fmt: skip
        [lora] = [cell for cell in cells(settings, grid) if cell.name == "lora-r8-int8"]
        own = replace(settings, type="lora", loop=replace(settings.loop, rank=8))
        assert lora == Cell("lora-r8-int8", own, "int8")
        last = cells(settings, grid)[-1].settings.loop
        assert (last.latents, last.latent_dim, last.rank) == (8, 16, 2)

    def test_without_axes_it_is_the_one_run(self, settings: Settings) -> None:
        assert cells(settings, Grid()) == [Cell("procrustes", settings)]

    def test_layers_may_be_runs_of_their_own(self, settings: Settings) -> None:
        found = cells(settings, Grid(("affine",), layers=("1", "0%, 2")))
        assert {cell.name: cell.settings.layers for cell in found} == {"affine-L1": "1", "affine-L0pc+2": "0%, 2"}

    def test_beside_a_shared_map_every_type_has_a_rank(self, settings: Settings) -> None:
        shared = replace(settings, type="affine", shared=True)
        assert [cell.name for cell in cells(shared, Grid(ranks=(2, 4)))] == ["affine-r2", "affine-r4"]

    @pytest.mark.parametrize(
        ("grid", "words"),
        [
            (Grid(("affine",), ranks=(8,)), "--ranks 8: no type of affine has any"),
            (Grid(("lora",), latents=(8, 9)), "--latents 8,9: no type of lora"),
            (Grid(latent_dims=(8,)), "--latent-dims 8: no type of procrustes"),
        ],
    )
    def test_an_axis_that_nobody_uses_is_refused(self, settings: Settings, grid: Grid, words: str) -> None:
        with pytest.raises(SpecError, match=words):
            cells(settings, grid)

    def test_a_run_that_cannot_be_meant_is_refused_by_name(self, settings: Settings) -> None:
        with pytest.raises(SpecError, match="cell procrustes: type 'procrustes' has a closed form only"):
            cells(replace(settings, solver="adamw"), Grid(("affine", "procrustes")))


def test_every_cell_is_the_run_that_train_makes(settings: Settings, here: Execution, tmp_path: Path) -> None:
    grid = parse_grid(types="procrustes,reduced-rank", ranks="2,4", formats="float32,float16")
    result = sweep(settings, grid, tmp_path / "out", execution=here, quiet=True)
    names = [
        f"{name}-{form}"
        for name in ("procrustes", "reduced-rank-r2", "reduced-rank-r4")
        for form in ("float32", "float16")
    ]
    assert statuses(result) == dict.fromkeys(names, "done")
    assert result["failed"] == []
    assert read_json(tmp_path / "out" / "sweep.json") == {
        key: value for key, value in result.items() if key not in ("comparison", "plots")
    }
    assert result["grid"]["ranks"] == [2, 4]
    # The store's own format is the store itself; the other was made once, and holds what it says.
    assert [path.name for path in (tmp_path / "out" / "stores").iterdir()] == ["float16.zarr"]
    converted = open_store(tmp_path / "out" / "stores" / "float16.zarr")
    assert converted.model("a").attributes["format"] == "float16"
    own = replace(settings, type="reduced-rank", loop=replace(settings.loop, rank=4))
    for name, store in (("float32", settings.store), ("float16", str(converted.path))):
        want = align.runs.train.train(replace(own, store=store), tmp_path / name, quiet=True)
        cell = read_json(tmp_path / "out" / f"reduced-rank-r4-{name}" / "metrics.json")
        assert {key: entry["test"] for key, entry in cell["pairs"].items()} == {
            key: entry["test"] for key, entry in want["pairs"].items()
        }
        [listed] = [cell for cell in result["cells"] if cell["name"] == f"reduced-rank-r4-{name}"]
        assert {key: entry["r2"] for key, entry in listed["pairs"].items()} == {
            key: entry["test"]["r2"] for key, entry in want["pairs"].items()
        }
        assert listed["seconds"] > 0
    # Two pairs of layers, six runs; rounded targets are other rows.
    rows = result["comparison"]["rows"]
    assert len(rows) == 12
    assert {row["set"] for row in rows} == {1, 2}
    text = describe(result)
    assert "6 runs made, 0 were there, 0 failed" in text
    assert "reduced-rank-r4-float16" in text


def test_what_is_finished_is_skipped_and_what_is_half_done_begins_anew(
    settings: Settings, here: Execution, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Grid(("procrustes", "affine", "linear"))
    sweep(settings, grid, tmp_path, execution=here, quiet=True)
    stamps = {name: (tmp_path / name / "adapter.json").stat().st_mtime_ns for name in grid.types}
    # A card comes last, and metrics before it: without the card the run is not done.
    (tmp_path / "affine" / "adapter.json").unlink()
    (tmp_path / "affine" / "left.txt").write_text("by a killed worker")
    made: list[str] = []
    own = align.runs.train.train
    monkeypatch.setattr(align.runs.train, "train", lambda s, run, **k: (made.append(run.name), own(s, run, **k))[1])
    result = sweep(settings, grid, tmp_path, execution=here, quiet=True)
    assert made == ["affine"]
    assert statuses(result) == {"procrustes": "skipped", "affine": "done", "linear": "skipped"}
    assert not (tmp_path / "affine" / "left.txt").exists()
    for name in ("procrustes", "linear"):
        assert (tmp_path / name / "adapter.json").stat().st_mtime_ns == stamps[name]
    assert "1 runs made, 2 were there, 0 failed" in describe(result)
    assert all(cell["pairs"]["a:1->b:1"]["r2"] > 0.5 for cell in result["cells"])


def test_a_cell_that_fails_is_named_and_the_others_go_on(
    settings: Settings, here: Execution, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = parse_grid(types="reduced-rank,affine,linear", ranks="2,99")
    own = Maker.candidate

    def fails(self: Maker, pair: Any) -> Any:
        if self._plan.type.name == "linear":
            raise ZeroDivisionError("by\nzero")
        return own(self, pair)

    with monkeypatch.context() as patch:
        patch.setattr(Maker, "candidate", fails)
        result = sweep(settings, grid, tmp_path, execution=here, quiet=True)
    assert statuses(result) == {
        "reduced-rank-r2": "done", "reduced-rank-r99": "failed", "affine": "done", "linear": "failed",
    }  # fmt: skip
    assert result["failed"] == ["reduced-rank-r99", "linear"]
    errors = {cell["name"]: cell["error"] for cell in result["cells"]}
    assert errors["reduced-rank-r99"] == "rank 99 does not fit widths 8 and 8: use 1 to 8"
    assert errors["linear"] == "ZeroDivisionError: by zero"
    assert {Path(row["run"]).name for row in result["comparison"]["rows"]} == {"reduced-rank-r2", "affine"}
    lines = describe(result).splitlines()
    assert "failed: linear: ZeroDivisionError: by zero" in lines
    assert "2 runs made, 0 were there, 2 failed" in lines
    # What failed is tried again, and nothing else.
    again = sweep(settings, grid, tmp_path, execution=here, quiet=True)
    assert statuses(again) == {
        "reduced-rank-r2": "skipped", "reduced-rank-r99": "failed", "affine": "skipped", "linear": "done",
    }  # fmt: skip


def test_a_format_that_cannot_be_made_fails_its_cells_alone(here: Execution, tmp_path: Path) -> None:
    x = spectrum_rows(600, 4, 1) * 1e6
    planted = plant(tmp_path / "s.zarr", x, x)
    grid = Grid(("procrustes", "affine"), formats=("float16", "float32"))
    result = sweep(Settings(str(planted.path)), grid, tmp_path / "out", execution=here, quiet=True)
    assert result["failed"] == ["procrustes-float16", "affine-float16"]
    assert "more than float16 can" in result["cells"][0]["error"]
    assert {row["type"] for row in result["comparison"]["rows"]} == {"procrustes", "affine"}


def test_no_run_of_somebody_else_is_touched(settings: Settings, here: Execution, tmp_path: Path) -> None:
    sweep(settings, Grid(("affine",)), tmp_path, execution=here, quiet=True)
    other = replace(settings, loop=replace(settings.loop, seed=1))
    with pytest.raises(SpecError, match=r"affine holds a run of other settings; choose another --out"):
        sweep(other, Grid(("procrustes", "affine")), tmp_path, execution=here, quiet=True)
    assert not (tmp_path / "procrustes").exists()
    (tmp_path / "linear").mkdir()
    (tmp_path / "linear" / "thesis.txt").write_text("years of work")
    with pytest.raises(SpecError, match="linear holds something that is no run"):
        sweep(settings, Grid(("linear",)), tmp_path, execution=here, quiet=True)
    assert (tmp_path / "linear" / "thesis.txt").exists()


def test_nothing_begins_without_a_scheduler_or_workers(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("align.execution.cluster.SCHEDULER_SECONDS", 0.5)
    with pytest.raises(SpecError, match=r"--scheduler tcp://127\.0\.0\.1:1: no Dask scheduler answers there"):
        sweep(settings, Grid(), tmp_path / "out", execution=Execution(scheduler="tcp://127.0.0.1:1"), quiet=True)


def dying_cells(settings: list[Settings], out: str, names: list[str], threads: int) -> list[float | Exception]:
    """Cells in a worker: whoever fits first leaves half a run behind and is killed, as by the system."""
    try:
        Path(os.environ["DIES_ONCE"]).touch(exist_ok=False)
    except FileExistsError:
        return run_together(settings, out, names, threads)
    run = Path(out) / names[-1]
    run.mkdir(parents=True)
    (run / "run.yaml").write_text("type: half")
    (run / "metrics.json").write_text("{")
    os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("killed processes do not get here")


@pytest.mark.thorough
def test_a_worker_that_is_killed_costs_nothing_but_time(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Grid(("procrustes", "affine", "linear", "reduced-rank"), ranks=(2, 3, 4))
    # Named relative to where the command runs.
    with monkeypatch.context() as patch:
        patch.setenv("DIES_ONCE", str(tmp_path / "died"))
        patch.setattr(align.sweeps.sweep, "run_together", dying_cells)
        patch.chdir(Path(settings.store).parent)
        own = replace(settings, store=Path(settings.store).name)
        result = sweep(own, grid, tmp_path / "out", execution=Execution(workers=2), quiet=True)
    assert (tmp_path / "died").exists()
    assert set(statuses(result).values()) == {"done"}
    assert len(result["comparison"]["rows"]) == 12
    # The cells that were interrupted are what it would have been.
    want = sweep(settings, grid, tmp_path / "calm", execution=Execution(workers=1), quiet=True)
    for mine, theirs in zip(result["cells"], want["cells"], strict=True):
        assert (mine["name"], mine["pairs"]) == (theirs["name"], theirs["pairs"])


@pytest.mark.parametrize("damaged", [False, True])
def test_a_training_that_was_begun_goes_on(
    settings: Settings, here: Execution, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    own = replace(settings, loop=replace(settings.loop, epochs=6, patience=6, min_delta=0.0))
    grid, out = Grid(("lora",)), tmp_path / "out"
    decide = align.training.loop.Training._decide

    def stop(self: Any, val_loss: float) -> None:
        decide(self, val_loss)
        if self.progress.epoch == 4:
            self._save()
            raise RuntimeError("the power went")

    with monkeypatch.context() as patch:
        patch.setattr(align.training.loop.Training, "_decide", stop)
        assert statuses(sweep(own, grid, out, execution=here, quiet=True)) == {"lora": "failed"}
    [state] = (out / "lora" / "checkpoints").rglob("*.safetensors")
    if damaged:
        state.write_bytes(b"no state")
    taken: list[int] = []
    take = align.training.loop.Training.take_steps
    monkeypatch.setattr(
        align.training.loop.Training, "take_steps", lambda s, start: (taken.append(s.progress.epoch), take(s, start))[1]
    )
    result = sweep(own, grid, out, execution=here, quiet=True)
    # Of two layer pairs the first was at its fourth epoch.
    assert taken == [*range(1 if damaged else 4, 7), *range(1, 7)]
    calm = sweep(own, grid, tmp_path / "calm", execution=here, quiet=True)
    assert result["cells"][0]["pairs"] == calm["cells"][0]["pairs"]


SWEEP = """
import sys
from pathlib import Path
from align.execution.options import Execution
from align.runs.candidates import Maker
from align.settings import LoopSettings, Settings
from align.sweeps.sweep import Grid, sweep

if __name__ == "__main__":
    loop = LoopSettings(skip="none", epochs=20, patience=20, min_delta=0.0)
    grid = Grid(("lora",), tuple(range(1, 5)))
    sweep(Settings(sys.argv[1], "lora", loop=loop), grid, Path(sys.argv[2]), execution=Execution(workers=1), quiet=True)
"""


def descendants(root: int) -> list[int]:
    """Processes below one, from /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    below, found = {root}, []
    while children := {pid for pid, parent in parents.items() if parent in below and pid not in below}:
        below |= children
        found += sorted(children)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.thorough
def test_a_sweep_that_is_killed_goes_on_where_it_was(planted: Planted, tmp_path: Path) -> None:
    script, out = tmp_path / "sweep_script.py", tmp_path / "out"
    script.write_text(SWEEP)
    process = subprocess.Popen([sys.executable, str(script), str(planted.path), str(out)])
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            assert process.poll() is None, "the sweep was to be killed on the way"
            done = [path.parent.name for path in out.glob("lora-r*/adapter.json")]
            begun = [path.parent.name for path in out.glob("lora-r*/run.yaml")]
            if done and set(begun) - set(done):
                break
            time.sleep(0.02)
        else:
            pytest.fail("no cell was finished in five minutes")
        below = descendants(process.pid)
    finally:
        process.kill()
        process.wait()
    # Its worker goes with it, or would write beside the next sweep.
    deadline = time.monotonic() + 30
    while any(map(alive, below)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, below))
    done = [path.parent.name for path in out.glob("lora-r*/adapter.json")]
    half = [path.name for path in out.glob("lora-r*") if path.name not in done]
    assert done
    assert half
    assert json.loads((out / "sweep.json").read_text())["grid"]["types"] == ["lora"]
    stamps = {name: (out / name / "adapter.json").stat().st_mtime_ns for name in done}
    loop = LoopSettings(skip="none", epochs=20, patience=20, min_delta=0.0)
    own = Settings(str(planted.path), "lora", loop=loop)
    result = sweep(own, Grid(("lora",), tuple(range(1, 5))), out, execution=Execution(workers=2), quiet=True)
    assert statuses(result) == {
        f"lora-r{rank}": "skipped" if f"lora-r{rank}" in done else "done" for rank in range(1, 5)
    }
    assert {name: (out / name / "adapter.json").stat().st_mtime_ns for name in done} == stamps
    assert len(result["comparison"]["rows"]) == 8


def test_closed_forms_over_the_same_rows_go_to_one_worker(settings: Settings) -> None:
    grid = Grid(("procrustes", "lora", "affine", "reduced-rank"), ranks=(2, 3), layers=("1", "2"))
    names = [[cell.name for cell in group] for group in groups(cells(settings, grid))]
    together = [
        sorted([f"procrustes-L{k}", f"affine-L{k}", f"reduced-rank-L{k}-r2", f"reduced-rank-L{k}-r3"]) for k in (1, 2)
    ]
    alone = [[f"lora-L{k}-r{rank}"] for k in (1, 2) for rank in (2, 3)]
    assert sorted(map(sorted, names)) == sorted([*together, *alone])


def test_a_group_is_resumed_cell_by_cell(settings: Settings, tmp_path: Path) -> None:
    own = [replace(settings, type=name) for name in ("procrustes", "affine")]
    names = ["procrustes", "affine"]
    assert all(isinstance(each, float) for each in run_together(own, str(tmp_path), names, 1))
    stamp = (tmp_path / "affine" / "adapter.json").stat().st_mtime_ns
    (tmp_path / "procrustes" / "adapter.json").unlink()
    assert all(isinstance(each, float) for each in run_together(own, str(tmp_path), names, 1))
    assert (tmp_path / "affine" / "adapter.json").stat().st_mtime_ns == stamp
    assert (tmp_path / "procrustes" / "adapter.json").is_file()


def test_two_sweeps_at_once_share_the_work(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waited for a cell's lock finds it finished."""
    made: list[str] = []
    own = align.runs.train.train
    monkeypatch.setattr(align.runs.train, "train", lambda s, run, **k: (made.append(run.name), own(s, run, **k))[1])
    for _ in range(2):
        assert run_cell(settings, str(tmp_path), "cell") > 0
    assert made == ["cell"]
    # A lock that another process holds is waited for.
    code = (
        "import fcntl, sys, time\n"
        "handle = open(sys.argv[1], 'w'); fcntl.flock(handle, fcntl.LOCK_EX); print('held', flush=True); time.sleep(1)"
    )
    lock = tmp_path / ".locks" / "cell"
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert run_cell(settings, str(tmp_path), "cell") > 0.5


def test_a_store_that_cannot_be_read_is_refused_at_once(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError):
        sweep(replace(settings, store=str(tmp_path / "none.zarr")), Grid(), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()
