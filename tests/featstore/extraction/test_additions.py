"""A store that grows: another layer, another model, more documents; and several processes writing one store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Lock
from typing import Any

import numpy as np
import pytest

from featstore import open_store
from featstore.errors import SpecError, StoreStateError
from featstore.extraction.forward import BatchReader
from featstore.extraction.job import prepare
from featstore.extraction.rows import open_reader
from featstore.extraction.run import extract
from featstore.extraction.settings import Settings
from featstore.runtime.processes import Ranks
from featstore.store.inspect.verify import verify_store
from featstore.store.moments.pieces import PieceSums, least_memory
from featstore.store.moments.writing import StoredRows
from featstore.store.write.index import add_pairs
from featstore.store.write.writer import StoreWriter
from tests.support.commands import call, command_environment
from tests.support.store_fixtures import tree_bytes


@pytest.fixture(scope="module")
def settings(tiny_llama, tiny_mistral, short_corpus, tmp_path_factory) -> Settings:
    return Settings(
        model=(f"llama={tiny_llama}", f"mistral={tiny_mistral}"),
        layers=("0,2,3",),
        dataset=f"jsonl:{short_corpus}",
        store=tmp_path_factory.mktemp("additions") / "none.zarr",
        max_tokens=None,
        window_bytes=512,
        batch_tokens=1024,
        shard_rows=1024,
        layout="archive",
        form="float32",
        device="cpu",
    )


def run(settings: Settings) -> Path:
    extract(prepare(settings, quiet=True), quiet=True)
    return settings.store


def typed(store: Path, **given) -> Settings:
    """What a user types who names only what is new."""
    return Settings(store=store, device="cpu", given=frozenset(given), **given)


def no_damage(path: Path) -> None:
    assert verify_store(path, quiet=True)["damage"] == []


def shard_files(path: Path) -> dict[str, int]:
    return {str(p.relative_to(path)): p.stat().st_mtime_ns for p in path.glob("models/*/resid/*/c/*/0")}


class StoppedError(Exception):
    pass


def stopping_after(monkeypatch: pytest.MonkeyPatch, commits: int) -> None:
    """Let so many units be committed, then stop."""
    commit, left = StoreWriter.commit, commits

    def limited(self, unit, files, **facts):
        nonlocal left
        if not left:
            raise StoppedError
        left -= 1
        commit(self, unit, files, **facts)

    monkeypatch.setattr(StoreWriter, "commit", limited)


def stopped_everywhere(settings: Settings, monkeypatch: pytest.MonkeyPatch, check: Callable[[], None]) -> int:
    """Run a command that may commit two units at a time, until it ends; returns how often it was stopped."""
    stops = 0
    while True:
        with monkeypatch.context() as patch:
            stopping_after(patch, 2)
            try:
                run(settings)
            except StoppedError:
                stops += 1
            else:
                return stops
        check()


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory) -> Path:
    return run(replace(settings, store=tmp_path_factory.mktemp("whole") / "store.zarr"))


class TestAnotherLayer:
    def test_what_is_there_stays_and_what_is_new_is_as_if_it_had_always_been(
        self, settings, whole, tmp_path, monkeypatch
    ):
        path = run(replace(settings, store=tmp_path / "store.zarr", layers=("0,2",)))
        before = shard_files(path)
        rows = open_store(path).rows("llama", 2)[:]

        closed = 0

        def still_readable() -> None:
            nonlocal closed
            try:
                store = open_store(path)
            except StoreStateError:
                closed += 1
            else:
                assert store.model("llama").layers == (0, 2)
                np.testing.assert_array_equal(store.rows("llama", 2)[100:200], rows[100:200])

        stops = stopped_everywhere(typed(path, layers=("3",)), monkeypatch, still_readable)
        # Only while masks and pairs are derived anew is the store closed.
        assert stops > 5 > 2 >= closed
        after = shard_files(path)
        assert {name: after[name] for name in before} == before
        store, at_once = open_store(path), open_store(whole)
        for name in ("llama", "mistral"):
            assert store.model(name).layers == (0, 2, 3)
            np.testing.assert_array_equal(
                store.rows(name, 3).stored(slice(None)), at_once.rows(name, 3).stored(slice(None))
            )
            np.testing.assert_array_equal(store.tokens(name).sink, at_once.tokens(name).sink)
            (added,) = store.model(name).attributes["additions"]
            assert added["layers"] == [3]
            assert "torch" in added["versions"]
        assert store.fingerprint == at_once.fingerprint
        no_damage(path)

    def test_an_adapters_fingerprint_does_not_change(self, settings, tmp_path):
        path = run(replace(settings, store=tmp_path / "store.zarr", layers=("0,2",)))
        layers = {"llama": (2,), "mistral": (0, 2)}
        before = open_store(path).fingerprint_of(layers)
        run(typed(path, layers=("llama=1",), model=settings.model[:1]))
        after = open_store(path)
        assert after.model("llama").layers == (0, 1, 2)
        assert after.model("mistral").layers == (0, 2)
        assert after.fingerprint_of(layers) == before
        assert after.fingerprint_of({"llama": (0,), "mistral": (0,)}) != before
        no_damage(path)


class TestAnotherModel:
    def test_it_reads_the_text_that_is_in_the_store(self, settings, whole, tmp_path, tiny_mistral, monkeypatch):
        path = tmp_path / "store.zarr"
        alone = replace(settings, store=path, model=settings.model[:1])
        run(alone)
        before = shard_files(path)
        command = typed(path, model=(f"mistral={tiny_mistral}",), layers=("0,2,3",))
        assert stopped_everywhere(command, monkeypatch, lambda: None) > 3
        after = shard_files(path)
        assert {name: after[name] for name in before} == before
        store, at_once = open_store(path), open_store(whole)
        assert store.models == ("llama", "mistral")
        assert store.fingerprint == at_once.fingerprint
        for ours, theirs in zip(
            vars(store.pairs("llama", "mistral")).values(),
            vars(at_once.pairs("llama", "mistral")).values(),
            strict=True,
        ):
            np.testing.assert_array_equal(ours, theirs)
        no_damage(path)

    def test_another_model_under_a_name_that_is_taken_is_refused(self, whole, tiny_mistral):
        with pytest.raises(StoreStateError, match=r"other settings \(.*llama\.config_sha256"):
            run(typed(whole, model=(f"llama={tiny_mistral}",)))


class TestMoreDocuments:
    def test_rows_are_added_and_none_is_computed_again(self, settings, tmp_path, monkeypatch):
        shorter = replace(settings, store=tmp_path / "store.zarr", max_documents=12)
        path = run(shorter)
        add_pairs(path, "word")
        first, before = open_store(path), shard_files(path)
        windows = len(first.corpus.window_document)
        pairs = {policy: len(first.pairs("llama", "mistral", policy)) for policy in ("end", "word")}
        rows = {name: first.rows(name, 3).stored(slice(None)) for name in first.models}
        full = {name for name in before if int(name.split("/")[5]) < first.model(name.split("/")[1]).rows // 1024}
        assert 4 < len(full) < len(before)
        copy = tmp_path / "copy.zarr"
        subprocess.run(["cp", "-r", "--preserve=timestamps", path, copy], check=True)
        run(typed(path, max_documents=30))
        store, after = open_store(path), shard_files(path)
        assert {name: after[name] for name in full} == {name: before[name] for name in full}
        assert store.attributes["segments"] == [windows]
        assert len(store.corpus.document_id) == 30
        for name in store.models:
            assert store.model(name).rows > len(rows[name]) + 1024
            np.testing.assert_array_equal(store.rows(name, 3).stored(slice(0, len(rows[name]))), rows[name])
        for policy in ("end", "word"):
            assert len(store.pairs("llama", "mistral", policy)) > pairs[policy]
        no_damage(path)
        # Stopped again and again, the same bytes come out.
        stops = stopped_everywhere(typed(copy, max_documents=30), monkeypatch, lambda: None)
        assert stops > 10
        assert tree_bytes(copy) == tree_bytes(path)
        run(typed(path))
        assert tree_bytes(copy) == tree_bytes(path)

    def test_the_states_are_those_of_reading_it_all_at_once(self, settings, whole, tmp_path):
        """Up to the composition of the batches, which moves states by rounding."""
        path = run(replace(settings, store=tmp_path / "store.zarr", max_tokens=4000))
        run(typed(path, max_tokens=None))
        store, at_once = open_store(path), open_store(whole)
        assert store.corpus.text.tobytes() == at_once.corpus.text.tobytes()
        for name in store.models:
            np.testing.assert_array_equal(store.tokens(name).id, at_once.tokens(name).id)
            np.testing.assert_allclose(store.rows(name, 3)[:], at_once.rows(name, 3)[:], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(
            store.pairs("llama", "mistral").row_source, at_once.pairs("llama", "mistral").row_source
        )
        no_damage(path)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"max_documents": 3}, r"other settings \(max_documents\)"),
            ({"seed": 5}, r"other settings \(seed\)"),
            ({"window_bytes": 256}, r"other settings \(window_bytes\)"),
        ],
    )
    def test_other_text_is_refused(self, whole, given, message):
        before = tree_bytes(whole)
        with pytest.raises(StoreStateError, match=message):
            run(typed(whole, **given))
        assert tree_bytes(whole) == before

    def test_a_larger_budget_that_finds_no_more_text_changes_nothing(self, whole, settings, capsys):
        before = tree_bytes(whole)
        extract(prepare(typed(whole, dataset=settings.dataset, max_documents=10_000), quiet=True))
        assert "already complete" in capsys.readouterr().err
        assert tree_bytes(whole) == before

    def test_together_with_another_model_it_is_refused(self, settings, tmp_path, tiny_mistral):
        path = run(replace(settings, store=tmp_path / "s.zarr", model=settings.model[:1], max_documents=10))
        with pytest.raises(StoreStateError, match=r"concern every model in it \(llama\) and no other"):
            run(typed(path, model=(*settings.model[:1], f"m={tiny_mistral}"), layers=("0",), max_documents=20))


class TestLayerZeroAsATable:
    @pytest.mark.parametrize("form", ["bfloat16", "int8"])
    def test_its_rows_are_the_same_and_it_is_smaller(self, settings, tmp_path, form):
        stored = open_store(run(replace(settings, store=tmp_path / "rows.zarr", form=form)))
        path = run(replace(settings, store=tmp_path / "table.zarr", form=form, layer_0="table"))
        table = open_store(path)
        assert not (path / "models" / "llama" / "resid" / "0").exists()
        for name in table.models:
            assert table.model(name).layers == (0, 2, 3)
            for choice in (slice(None), slice(5, 900, 7), [3, 1, 2000]):
                np.testing.assert_array_equal(table.rows(name, 0).stored(choice), stored.rows(name, 0).stored(choice))
                np.testing.assert_array_equal(table.rows(name, 0)[choice], stored.rows(name, 0)[choice])
            np.testing.assert_array_equal(table.norms(name, 0), stored.norms(name, 0))
            np.testing.assert_array_equal(table.tokens(name).sink, stored.tokens(name).sink)
            assert table.rows(name, 0).shape == stored.rows(name, 0).shape
        no_damage(path)

    def test_it_grows_with_the_text(self, settings, tmp_path):
        path = run(replace(settings, store=tmp_path / "s.zarr", layer_0="table", max_documents=8))
        before = open_store(path).rows("llama", 0)
        first = before[:]
        run(typed(path, max_documents=20))
        after = open_store(path).rows("llama", 0)
        assert after.table.rows > before.table.rows
        np.testing.assert_array_equal(after[: len(first)], first)
        no_damage(path)

    def test_a_later_layer_0_is_a_table_too(self, settings, tmp_path):
        path = run(replace(settings, store=tmp_path / "s.zarr", layer_0="table", layers=("2",)))
        run(typed(path, layers=("0",)))
        assert open_store(path).rows("mistral", 0)[:].shape == (open_store(path).model("mistral").rows, 32)
        no_damage(path)


class ThreadRanks(Ranks):
    """Processes of a launcher, as threads of this one."""

    def __init__(self, rank: int, world: int, barrier: Barrier) -> None:
        super().__init__(rank, world)
        object.__setattr__(self, "_barrier", barrier)

    def wait(self) -> None:
        self._barrier.wait(60)


def together(settings: Settings, world: int) -> None:
    """Extract with several processes."""
    job, barrier, one_at_a_time = prepare(settings, quiet=True), Barrier(world), Lock()

    def opened(*args: Any, **options: Any) -> BatchReader:
        with one_at_a_time:  # transformers loads a model by settings of the whole process
            return open_reader(*args, **options)

    with ThreadPoolExecutor(world) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr("featstore.extraction.moments_only.open_reader", opened)
        patch.setattr("featstore.extraction.rows.open_reader", opened)
        for done in [pool.submit(extract, job, quiet=True, ranks=ThreadRanks(r, world, barrier)) for r in range(world)]:
            done.result()


@pytest.fixture(scope="module")
def with_rows(settings, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("moments") / "rows.zarr"
    return run(replace(settings, store=path, form="bfloat16", moments="add"))


class TestMoments:
    """With rows, and without: bit for bit the same sums."""

    def moments(self, path: Path) -> dict[str, bytes]:
        return {name: data for name, data in tree_bytes(path).items() if name.startswith(("moments/", "pairs/"))}

    def test_without_rows_they_are_the_same(self, settings, with_rows, tmp_path):
        path = run(replace(settings, store=tmp_path / "s.zarr", form="bfloat16", moments="only"))
        assert not list(path.glob("models/*/resid/*/c"))
        ours = self.moments(path)
        assert len([name for name in ours if name.endswith("correlation/c/0/0")]) == 3 * 21
        assert ours == self.moments(with_rows)
        store, rows = open_store(path), open_store(with_rows)
        for name in store.models:
            np.testing.assert_array_equal(store.tokens(name).sink, rows.tokens(name).sink)
            np.testing.assert_array_equal(store.norms(name, 2), rows.norms(name, 2))
        no_damage(path)
        assert sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) > 0

    def test_little_memory_leaves_totals_aside_to_the_same_end(self, settings, with_rows, tmp_path, monkeypatch):
        mine = replace(settings, store=tmp_path / "s.zarr", form="bfloat16", moments="only")
        widths = [model.width for model in map(open_store(with_rows).model, ("llama", "mistral")) for _ in range(3)]
        least = sum(least_memory(widths, prepare(mine, quiet=True).encoding.shard_rows))
        written = []
        original = PieceSums._write
        monkeypatch.setattr(PieceSums, "_write", lambda self, *args: (written.append(args), original(self, *args)))
        run(replace(mine, moments_memory=least))
        assert len(written) > 3 * 21, "several times for a block"
        assert self.moments(tmp_path / "s.zarr") == self.moments(with_rows)
        assert not (tmp_path / "s.zarr" / ".sums").exists()

    def test_stopped_again_and_again_they_are_the_same(self, settings, with_rows, tmp_path, monkeypatch):
        mine = replace(settings, store=tmp_path / "s.zarr", form="bfloat16", moments="only", layers=("2",))
        run(replace(mine, store=tmp_path / "once.zarr"))
        commit, stops = StoreWriter.commit, 0
        while True:
            with monkeypatch.context() as patch:
                stopping_after(patch, 5)
                try:
                    run(mine)
                    break
                except StoppedError:
                    stops += 1
        assert stops >= 3
        assert StoreWriter.commit is commit
        assert tree_bytes(mine.store) == tree_bytes(tmp_path / "once.zarr")

    def test_a_layer_added_later(self, settings, with_rows, tmp_path):
        path = run(replace(settings, store=tmp_path / "s.zarr", form="bfloat16", moments="only", layers=("0,2",)))
        run(typed(path, layers=("3",)))
        assert self.moments(path) == self.moments(with_rows)

    def test_rows_that_are_there_get_theirs_later(self, settings, with_rows, tmp_path):
        path = run(replace(settings, store=tmp_path / "s.zarr", form="bfloat16"))
        run(typed(path, moments="add"))
        assert self.moments(path) == self.moments(with_rows)
        no_damage(path)

    @pytest.mark.parametrize(
        ("form", "moments", "world"),
        [("bfloat16", "only", 2), ("int8", "add", 3), pytest.param("int8", "only", 3, marks=pytest.mark.thorough)],
    )
    def test_any_number_of_processes_makes_the_same(self, settings, tmp_path, monkeypatch, form, moments, world):
        mine = replace(settings, form=form, moments=moments, shard_rows=1024, layer_0="table", layers=("0,2",))
        one = run(replace(mine, store=tmp_path / "one.zarr"))
        together(replace(mine, store=tmp_path / "many.zarr"), world)
        assert tree_bytes(tmp_path / "many.zarr") == tree_bytes(one)
        no_damage(one)
        if moments == "add":
            # Every pair was summed on the way: no pass over the rows was left.
            monkeypatch.setattr(StoredRows, "rows", None)
            assert tree_bytes(run(replace(mine, store=tmp_path / "again.zarr"))) == tree_bytes(one)

    @pytest.mark.parametrize("moments", ["only", "add"])
    def test_after_a_kill_another_number_of_processes_goes_on(self, settings, tmp_path, monkeypatch, moments):
        mine = replace(settings, form="bfloat16", moments=moments, shard_rows=1024, layers=("2",))
        one = run(replace(mine, store=tmp_path / "one.zarr"))
        killed = replace(mine, store=tmp_path / "killed.zarr")
        added, original = [], PieceSums.add

        def add(self, piece, source):
            added.append(piece)
            if len(added) == 4:
                raise StoppedError
            return original(self, piece, source)

        monkeypatch.setattr(PieceSums, "add", add)
        monkeypatch.setattr("featstore.store.moments.pieces.FLUSH", 0.0)
        with pytest.raises(StoppedError):
            run(killed)
        together(killed, 2)
        assert tree_bytes(killed.store) == tree_bytes(one)
        assert sorted(added) == [0, 1, 2, 3, 3, 4, 5, 6, 7], "pieces that were summed are not summed again"

    def test_one_model_has_no_pairs(self, settings, tmp_path):
        with pytest.raises(SpecError, match="name a second one with --model"):
            run(replace(settings, store=tmp_path / "s.zarr", model=settings.model[:1], moments="only"))


def command(settings: Settings, *more: str) -> list[str]:
    words = ["extract", "--dataset", settings.dataset, "--layers", "0,2,3", "--max-tokens", "all", "--device", "cpu"]
    for name in ("window_bytes", "batch_tokens", "shard_rows"):
        words += [f"--{name.replace('_', '-')}", str(getattr(settings, name))]
    for model in settings.model:
        words += ["--model", model]
    return [*words, *more]


def launch(processes: int, *words: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "featstore"]
    environment = command_environment() | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *(launcher if processes > 1 else ["-m", "featstore"]), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.thorough
@pytest.mark.parametrize(("processes", "moments"), [(2, "--moments"), (3, "--moments"), (2, "--moments-only")])
def test_several_processes_write_the_same_bytes_as_one(settings, tmp_path, capsys, processes, moments):
    words = command(settings, "--layer-0", "table", "--format", "int8", "--json", moments)
    trees = []
    for count in (1, processes):
        path = tmp_path / f"{count}.zarr"
        if count == 1:
            result = call(capsys, "featstore", *words, "--store", path).json
        else:
            done = launch(count, *words, "--store", str(path))
            assert done.returncode == 0, done.stderr
            result = json.loads(done.stdout)  # one process speaks
        assert result["models"]["llama"]["rows"] == open_store(path).model("llama").rows
        trees.append(tree_bytes(path))
        no_damage(path)
    assert trees[0] == trees[1]


@pytest.mark.thorough
def test_a_process_that_dies_takes_the_others_with_it_and_the_same_command_goes_on(settings, tmp_path):
    words = command(settings, "--format", "float32", "--layout", "archive", "--moments")
    path = tmp_path / "s.zarr"
    program = f"""
import os, signal, sys
from featstore.store.write.row_writer import RowWriter
commit = RowWriter._commit
def dying(self, layer, shard, buffer):
    if os.environ["RANK"] == "1" and layer == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    commit(self, layer, shard, buffer)
RowWriter._commit = dying
sys.argv = ["featstore", *{[*words, "--store", str(path)]!r}]
from featstore.cli import main
main()
"""
    script = tmp_path / "dying.py"
    script.write_text(program)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = command_environment() | {"OMP_NUM_THREADS": "1"}
    died = subprocess.run(launcher, env=environment, capture_output=True, text=True, check=False)
    assert died.returncode != 0
    assert list(path.glob("manifest/models/llama/resid/*/rows-*.json"))
    with pytest.raises(StoreStateError, match="unfinished"):
        open_store(path)
    assert launch(2, *words, "--store", str(path)).returncode == 0
    assert launch(1, *words, "--store", str(tmp_path / "one.zarr")).returncode == 0
    assert tree_bytes(path) == tree_bytes(tmp_path / "one.zarr")


def test_nothing_of_the_processes_is_in_the_environment_by_default():
    assert "RANK" not in os.environ
