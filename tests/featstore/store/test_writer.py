"""Writers that are killed: at random moments, and at every single step of the file system."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from featstore import open_store
from featstore.errors import CorruptDataError, NoSpaceError, StoreAccessError, StoreBusyError, StoreStateError
from featstore.store.format.elements import parse_format
from featstore.store.format.shards import file_checksum, parse_layout
from featstore.store.inspect.verify import verify_store
from featstore.store.write.row_writer import RowArrays, RowWriter, rows_unit
from featstore.store.write.space import check_space, free_bytes
from featstore.store.write.writer import StoreWriter, exclusive, read_entry
from tests.support import ROOT
from tests.support.store_fixtures import Recipe, tree_bytes, write_quickly, write_store

RECIPE = Recipe(shard_rows=256, layers=(0, 1, 2), documents=16)
KILLS = 50

#: Imports once; then, for every path that it reads, a process of its own writes a store there.
WRITERS = """
import os, sys
from pathlib import Path
from tests.support import store_fixtures as made
recipe = made.Recipe(shard_rows=256, layers=(0, 1, 2), documents=16)
assert "torch" not in sys.modules and "transformers" not in sys.modules
for line in sys.stdin:
    writer = os.fork()
    if writer == 0:
        made.write_store(Path(line.strip()), recipe)
        os._exit(0)
    print(writer, flush=True)
    sys.stdin.readline()  # until then the process id stays taken
    print(os.waitpid(writer, 0)[1], flush=True)
"""


class Writers:
    """Processes that write stores, one after another."""

    def __init__(self) -> None:
        self._parent = subprocess.Popen(
            [sys.executable, "-c", WRITERS],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _ask(self, line: str) -> int:
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write(line + "\n")
        self._parent.stdin.flush()
        return int(self._parent.stdout.readline())

    def start(self, path: Path) -> int:
        """Start one; its process id, which is its own until :meth:`wait`."""
        return self._ask(str(path))

    def wait(self) -> int:
        """How the one that was started ended: 0, or minus the signal."""
        return os.waitstatus_to_exitcode(self._ask(""))

    def close(self) -> None:
        self._parent.communicate()


@pytest.fixture
def writers() -> Iterator[Writers]:
    made = Writers()
    yield made
    made.close()


def check_invariants(path: Path) -> None:
    """What must hold at every moment: committed units are whole, and no row is announced that is not there."""
    if not (path / "zarr.json").exists():
        return
    for document in path.rglob("zarr.json"):
        json.loads(document.read_text())  # old or new, never a part
    manifest = path / "manifest"
    for entry in manifest.rglob("*.json"):
        unit = entry.relative_to(manifest).with_suffix("").as_posix()
        if unit == "metadata":
            continue
        for name, record in read_entry(entry, unit)["files"].items():
            data = (path / name).read_bytes()
            assert len(data) == record["bytes"]
            assert file_checksum(data) == record["crc32"]
    for document in path.glob("models/*/*/*/zarr.json"):
        kind, layer = document.parts[-3:-1]
        if kind not in ("resid", "norm"):
            continue
        model = document.parts[-4]
        rows = json.loads(document.read_text())["shape"][0]
        committed = 0
        while (manifest / f"{rows_unit(model, int(layer), committed)}.json").exists():
            committed += 1
        assert rows <= committed * RECIPE.shard_rows, (model, kind, layer)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    return tree_bytes(write_quickly(tmp_path_factory.mktemp("undisturbed") / "store.zarr", RECIPE))


@pytest.mark.thorough
def test_a_writer_killed_at_random_moments_ends_with_the_same_bytes(undisturbed, writers, tmp_path):
    rng = random.Random(0)
    path = tmp_path / "store.zarr"
    start = time.monotonic()
    writers.start(tmp_path / "timed.zarr")
    assert writers.wait() == 0
    duration = min(time.monotonic() - start, 1.5)
    killed = rounds = 0
    while killed < KILLS or not rounds:
        writer = writers.start(path)
        time.sleep(rng.uniform(0, duration * 0.5))
        os.kill(writer, signal.SIGKILL)
        ended = writers.wait()
        assert ended in (0, -signal.SIGKILL)
        killed += ended == -signal.SIGKILL
        check_invariants(path)
        if (path / "manifest" / "metadata.json").exists():  # nearly done: finish, compare, begin again
            write_quickly(path, RECIPE)
            assert tree_bytes(path) == undisturbed
            rounds += 1
            path = tmp_path / f"store-{rounds}.zarr"
    write_quickly(path, RECIPE)
    assert tree_bytes(path) == undisturbed


EVERY_STEP = """
import os, signal, sys
from pathlib import Path
from tests.support import store_fixtures as made
from featstore.store.write.index import add_pairs

root, what = Path(sys.argv[1]), sys.argv[2]
recipe = made.Recipe(shard_rows=256, layers=(0, 2), documents=3, document_bytes=300, width=2)
os.fsync = lambda _: None  # a killed process loses nothing that it has written; only a power cut would

def work(path):
    made.write_store(path, recipe) if what == "write" else add_pairs(path, "word")

def prepare(path):
    if what == "pair":
        made.write_store(path, recipe)
    return path

whole = prepare(root / "whole")
work(whole)
expected = made.tree_bytes(whole)

def dying_after(steps):
    \"\"\"Count the renames, by which alone anything comes to be, and die just before or just after one.\"\"\"
    left, real = [steps], os.replace
    def replace(*args, **options):
        for when in ("before", "after"):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            if when == "before":
                real(*args, **options)
    os.replace = replace

step = 0
while True:
    path = prepare(root / f"s{step}")
    child = os.fork()
    if child == 0:
        dying_after(step)
        work(path)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
    print(step, flush=True)
    sys.stdin.readline()  # the test looks at what is left
    work(path)
    found = made.tree_bytes(path)
    if found != expected:
        different = sorted(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k))
        sys.exit(f"killed at step {step}: {different} differ")
    step += int(sys.argv[3])
print("all", flush=True)
"""


@pytest.mark.parametrize(
    ("what", "stride", "least"),
    [
        ("write", 41, 3),
        ("pair", 7, 2),
        pytest.param("write", 5, 30, marks=pytest.mark.thorough),
        pytest.param("pair", 1, 15, marks=pytest.mark.thorough),
    ],
)
def test_a_writer_killed_at_every_step_ends_with_the_same_bytes(tmp_path, what, stride, least):
    """Just before and just after every rename; of a whole store every fifth. Odd strides take both by turns."""
    process = subprocess.Popen(
        [sys.executable, "-c", EVERY_STEP, str(tmp_path), what, str(stride)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    steps = 0
    with process:
        for line in process.stdout:
            if line == "all\n":
                break
            path = tmp_path / f"s{line.strip()}"
            check_invariants(path)
            if what == "pair":  # a complete store stays readable while something is added to it
                assert len(open_store(path).pairs("a", "b")) > 100
            elif (path / "zarr.json").exists():
                if b'"complete": true' in (path / "zarr.json").read_bytes():
                    assert not verify_store(path, quiet=True)["damage"]
                else:
                    with pytest.raises(StoreStateError, match="unfinished"):
                        open_store(path)
            steps += 1
            process.stdin.write("\n")
            process.stdin.flush()
        process.stdin.close()
    assert process.returncode == 0
    assert steps >= least


def test_no_trace_of_time_or_process_is_left(undisturbed, tmp_path):
    assert not [name for name in undisturbed if name.endswith(".part")]
    again = tree_bytes(write_store(tmp_path / "elsewhere.zarr", RECIPE))
    assert again == undisturbed
    text = b"".join(data for name, data in undisturbed.items() if name.endswith(".json"))
    for trace in (str(tmp_path), str(os.getpid()) + '"', os.uname().nodename, time.strftime("%Y-%m-%d")):
        assert trace.encode() not in text


class TestLock:
    # Nobody may make directories in /proc.
    @pytest.mark.parametrize("place", ["/proc/store.zarr", "/dev/null/store.zarr"])
    def test_a_place_that_takes_nothing_is_refused_in_one_line(self, place):
        with (
            pytest.raises(StoreAccessError, match=rf"^{place} cannot be written to \(.*\); copy it to where you may"),
            exclusive(Path(place)),
        ):
            pass

    def test_a_second_writer_is_told(self, tmp_path):
        path = tmp_path / "store.zarr"
        with exclusive(path), pytest.raises(StoreBusyError, match="is being written by another process"):
            write_store(path, RECIPE)
        write_quickly(path, RECIPE)

    def test_a_writer_in_another_process_is_noticed_and_its_death_too(self, tmp_path):
        path = tmp_path / "store.zarr"
        code = "import sys, time; from pathlib import Path; from featstore.store.write.writer import exclusive\n"
        code += "with exclusive(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(600)\n"
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(StoreBusyError):
            write_store(path, RECIPE)
        process.kill()
        process.communicate()
        write_quickly(path, RECIPE)

    def test_what_a_killed_writer_left_aside_is_swept(self, tmp_path):
        path = write_quickly(tmp_path / "store.zarr", RECIPE)
        for name in (".zarr.json.abc.part", "models/a/resid/0/c/0/.0.part"):
            (path / name).write_bytes(b"half")
        with exclusive(path):
            assert not list(path.rglob(".*.part"))


class TestUnits:
    def test_a_unit_exists_once_its_manifest_entry_does(self, tmp_path):
        writer = StoreWriter(tmp_path)
        assert not writer.has("u")
        writer.commit("u", {"x/y": b"12345"})
        assert writer.has("u")
        assert (tmp_path / "x" / "y").read_bytes() == b"12345"
        assert list(writer.unit_names()) == ["u"]
        entry = json.loads((tmp_path / "manifest" / "u.json").read_text())
        assert entry == {"unit": "u", "files": {"x/y": {"bytes": 5, "crc32": "cbf53a1c"}}}

    def test_a_unit_whose_file_shrank_or_went_does_not(self, tmp_path):
        writer = StoreWriter(tmp_path)
        writer.commit("u", {"x": b"12345"})
        (tmp_path / "x").write_bytes(b"1234")
        assert not writer.has("u")
        (tmp_path / "x").unlink()
        assert not writer.has("u")

    @pytest.mark.parametrize(
        "text",
        ["", "{}", "[]", '{"unit": "u"}', '{"unit": "v", "files": {}}', '{"unit": "u", "files": []}']
        + [f'{{"unit": "u", "files": {{"x": {record}}}}}' for record in ("null", "{}", '{"bytes": 1}', "5")]
        + ['{"unit": "u", "files": {"x": {"bytes": "5", "crc32": "cbf53a1c"}}}']
        + ['{"unit": "u", "files": {"x": {"bytes": 5, "crc32": "CBF53A1C"}}}']
        + ['{"unit": "u", "files": {"../x": {"bytes": 5, "crc32": "cbf53a1c"}}}'],
    )
    def test_a_damaged_entry_neither_counts_as_written_nor_as_missing(self, tmp_path, text):
        writer = StoreWriter(tmp_path)
        writer.commit("u", {"x": b"12345"})
        (tmp_path / "manifest" / "u.json").write_text(text)
        with pytest.raises(CorruptDataError, match=r"u\.json"):
            writer.has("u")

    def test_a_full_disk_leaves_the_unit_uncommitted(self, tmp_path, monkeypatch):
        writer = StoreWriter(tmp_path)

        def full(_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(NoSpaceError, match=r"cannot write .*/x \(No space left on device\).*run the same command"):
            writer.commit("u", {"x": b"12345"})
        assert not writer.has("u")
        monkeypatch.undo()
        writer.commit("u", {"x": b"12345"})
        assert writer.has("u")


class TestSpace:
    def test_too_little_is_said_in_numbers_with_the_remedy(self, tmp_path):
        with pytest.raises(NoSpaceError, match=r"x\.zarr needs 1e\+03 TB and .* are free; buy a disk"):
            check_space(tmp_path / "x.zarr", 10**15, "buy a disk")
        check_space(tmp_path / "x.zarr", 1, "")

    def test_a_path_that_does_not_exist_yet_lies_on_its_parents_disk(self, tmp_path):
        assert abs(free_bytes(tmp_path / "a" / "b" / "c") - free_bytes(tmp_path)) < 1e9
        assert not (tmp_path / "a").exists()


def row_writer(path: Path, rows: int = 1000, shard_rows: int = 256, owned: range | None = None) -> RowWriter:
    arrays = RowArrays(rows, 3, (0, 1), shard_rows, parse_format("float32"), parse_layout("archive"))
    return RowWriter(StoreWriter(path), "m", arrays, owned)


class TestRowWriter:
    def put(self, writer: RowWriter, start: int, end: int) -> None:
        for layer in writer.arrays.layers:
            rows = np.arange(start, end, dtype=np.float32)[:, None] + np.zeros((1, 3), np.float32) + 10_000 * layer
            writer.put(start, layer, parse_format("float32").encode(rows))

    def announced(self, path: Path) -> int:
        return json.loads((path / "models/m/resid/1/zarr.json").read_text())["shape"][0]

    def test_shards_are_committed_once_all_their_rows_are_there(self, tmp_path):
        writer = row_writer(tmp_path)
        assert (writer.arrays.shards, self.announced(tmp_path)) == (4, 0)
        self.put(writer, 100, 300)
        self.put(writer, 0, 100)
        assert writer.advance(255) == 0
        assert writer.advance(256) == 2
        assert self.announced(tmp_path) == 256
        self.put(writer, 300, 1000)
        assert writer.advance(999) == 4
        assert self.announced(tmp_path) == 768
        assert not writer.complete
        assert writer.advance(1000) == 2
        assert self.announced(tmp_path) == 1000
        assert writer.complete

    def test_a_gap_holds_the_row_count_back(self, tmp_path):
        writer = row_writer(tmp_path)
        self.put(writer, 0, 1000)
        writer.advance(1000)
        (tmp_path / "manifest" / f"{rows_unit('m', 1, 1)}.json").unlink()
        again = row_writer(tmp_path)
        assert not again.complete
        assert self.announced(tmp_path) == 256
        assert [again.missing(*r) for r in ((0, 256), (255, 257), (256, 300), (511, 512), (512, 1000))] == [
            (), (1,), (1,), (1,), (),
        ]  # fmt: skip
        self.put(again, 200, 600)  # rows of committed shards are passed over
        assert again.advance(600) == 1
        assert self.announced(tmp_path) == 1000

    def test_more_rows_rewrite_the_last_shard_and_keep_what_it_held(self, tmp_path):
        shorter = row_writer(tmp_path, rows=300)
        self.put(shorter, 0, 300)
        shorter.advance(300)
        whole = (tmp_path / "models/m/resid/1/c/0/0").read_bytes()
        longer = row_writer(tmp_path, rows=600)
        assert self.announced(tmp_path) == 300
        assert [longer.missing(*r) for r in ((0, 300), (299, 301), (300, 600))] == [(), (0, 1), (0, 1)]
        self.put(longer, 300, 600)
        longer.advance(600)
        undisturbed = row_writer(tmp_path / "once", rows=600)
        self.put(undisturbed, 0, 600)
        undisturbed.advance(600)
        assert (tmp_path / "models/m/resid/1/c/0/0").read_bytes() == whole
        for name in ("models", "manifest"):
            assert tree_bytes(tmp_path / name) == tree_bytes(tmp_path / "once" / name)

    def test_processes_write_their_own_shards_and_the_first_counts(self, tmp_path):
        for owned in (range(2, 4), range(2)):
            writer = row_writer(tmp_path, owned=owned)
            assert writer.missing(511, 513) == (0, 1)
            self.put(writer, 0, 1000)
            assert writer.advance(1000) == 4
            assert writer.complete
            assert not (tmp_path / "models/m/resid/1/zarr.json").exists()
        writer.count_rows()
        assert self.announced(tmp_path) == 1000

    def test_shards_are_whole_chunks(self, tmp_path):
        with pytest.raises(
            StoreStateError, match="--shard-rows 300 is not a multiple of 256, the chunk of layout arch"
        ):
            row_writer(tmp_path, shard_rows=300)


def test_a_store_written_with_patience_verifies(undisturbed, tmp_path):
    path = write_quickly(tmp_path / "store.zarr", RECIPE)
    found = verify_store(path, quiet=True)
    assert found["damage"] == []
    assert found["files"] == sum(1 for name in undisturbed if "manifest/" not in name and not name.startswith("."))
    assert found["bytes"] == sum(
        len(data) for name, data in undisturbed.items() if "manifest/" not in name and not name.startswith(".")
    )
