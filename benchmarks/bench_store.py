"""Reading and writing states: this store beside other ways to keep the same rows.

    python benchmarks/bench_store.py --gib 1

The rows are real: SmolLM2's states at layers 8, 15, 23 and 30, side by side until they are 4096 columns wide. Different
columns of a row come from different tokens, and each time the tokens come round the values are scaled a little
differently, so no row occurs twice and compression has nothing to find that a wider model would not offer.

A numpy memmap of one flat file is the reference, 1.0. `buffer` reads 4096 rows at a time into the same memory, `fresh`
into new arrays; `rows` takes 8192 rows at random, `chunks` 32 runs of 256 rows. `warm` readers stay open, as training
holds them; `cold` ones are opened anew after `posix_fadvise(DONTNEED)`, which needs no root: `mincore` says what share
of the files stayed in memory all the same. Every contender's rows are compared with what was written before anything
is timed.

Writers get the same rows in memory and end with fsync. `plain` is one flat file; ours adds checksums of every chunk and
file, shards, a rename each and the manifest. zarr-python does not fsync, so its files are fsynced after it.

Stated beside the ratios are the parts that bound them: copying memory, CRC-32C, CRC-32, decompression, the disk.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _measure import (
    at_least,
    by_round,
    drop_from_cache,
    figures,
    interleaved,
    judged,
    keep,
    machine,
    recorded,
    seconds,
    table,
    versions_of,
)
from numpy.typing import NDArray

from featstore.store.format.documents import rows_document
from featstore.store.format.dtypes import bfloat16_bits, bfloat16_values
from featstore.store.format.elements import FORMATS
from featstore.store.format.shards import (
    LAYOUTS,
    crc32c,
    decode_chunk,
    encode_chunk,
    encode_shard,
    file_checksum,
    shard_pieces,
)
from featstore.store.read.rows import RowReader
from featstore.store.write.writer import StoreWriter, exclusive

ROOT = Path(__file__).parents[1]
FORM = FORMATS["bfloat16"]
WIDTH = 4096
LAYERS = (8, 15, 23, 30)
SHARD_ROWS = 16_384
SLICE_ROWS = 4096
RANDOM_ROWS = 8192
CHUNK_ROWS = 256

Array = NDArray[np.uint16]


# The rows -----------------------------------------------------------------------------------------------------------


def real_states(tokens: int) -> NDArray[np.uint16]:
    """SmolLM2's states of the committed Wikipedia sample: (layers, tokens, 576) as bfloat16 payloads."""
    cached = ROOT / ".cache" / "bench" / f"smollm2-{tokens}.npy"
    if cached.is_file():
        held: NDArray[np.uint16] = np.load(cached)
        return held
    from featstore import open_store
    from featstore.demo.pair import build_pair
    from featstore.demo.sample import sample_path
    from featstore.extraction.job import prepare
    from featstore.extraction.run import extract
    from featstore.extraction.settings import Settings

    demo = ROOT / ".cache" / "demo"
    model = build_pair(demo, demo / "assets").source
    with tempfile.TemporaryDirectory() as name:
        text = Path(name) / "sample.jsonl"
        text.write_bytes(gzip.decompress(sample_path().read_bytes()))
        settings = Settings(
            model=(f"smollm2={model}",),
            layers=(",".join(map(str, LAYERS)),),
            dataset=f"jsonl:{text}",
            store=Path(name) / "states.zarr",
            max_tokens=tokens,
            device="cpu",
        )
        extract(prepare(settings, quiet=True), quiet=True)
        store = open_store(settings.store)
        ordinary = np.flatnonzero(~store.tokens("smollm2").sink)
        states = np.stack([store.rows("smollm2", layer).stored(ordinary) for layer in LAYERS])
    cached.parent.mkdir(parents=True, exist_ok=True)
    np.save(cached, states)
    return states


def wide_rows(states: NDArray[np.uint16], first: int, count: int) -> Array:
    """Rows first..first+count of an endless array of width 4096 made from real states."""
    layers, tokens, width = states.shape
    number = np.arange(first, first + count)
    result = np.empty((count, WIDTH), np.uint16)
    for part, column in enumerate(range(0, WIDTH, width)):
        # Every part of a row is another token's; a prime step keeps them from meeting again.
        token = (number + 7919 * (part // layers)) % tokens
        louder = 1 + 0.01 * ((number // tokens + part) % 50).astype(np.float32)
        values = bfloat16_values(states[part % layers][token]) * louder[:, None]
        result[:, column : column + width] = bfloat16_bits(values)[:, : WIDTH - column]
    return result


# Writing it in every way --------------------------------------------------------------------------------------------


def write_ours(path: Path, array: Array, layout_name: str) -> None:
    """One layer as a store holds it: whole shards, fsynced and renamed, each with a row of the manifest."""
    layout = LAYOUTS[layout_name]
    with exclusive(path):
        writer = StoreWriter(path)
        writer.group("", {})
        writer.describe({"states": rows_document(*array.shape, SHARD_ROWS, FORM, layout)})
        for shard, start in enumerate(range(0, len(array), SHARD_ROWS)):
            data = shard_pieces(array[start : start + SHARD_ROWS], SHARD_ROWS, layout)
            writer.commit(f"rows-{shard:06d}", {f"states/c/{shard}/0": data})


def write_plain(path: Path, array: Array) -> None:
    with path.open("wb") as handle:
        for start in range(0, len(array), SHARD_ROWS):
            handle.write(memoryview(array[start : start + SHARD_ROWS]).cast("B"))
        handle.flush()
        os.fsync(handle.fileno())


def write_zarr(path: Path, array: Array, layout_name: str) -> None:
    import zarr
    from zarr.codecs import BloscCodec

    layout = LAYOUTS[layout_name]
    blosc = BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", typesize=2, blocksize=1 << 19)
    target = zarr.create_array(
        path,
        shape=array.shape,
        dtype="uint16",
        chunks=(layout.chunk_rows, WIDTH),
        shards=(SHARD_ROWS, WIDTH),
        compressors=[blosc] if layout.compressed else None,
    )
    for start in range(0, len(array), SHARD_ROWS):
        target[start : start + SHARD_ROWS] = array[start : start + SHARD_ROWS]
    for file in path.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)


def write_peers(root: Path, array: Array) -> None:
    import datasets
    import h5py
    import pyarrow as pa
    from safetensors.numpy import save_file

    save_file({"states": array}, root / "states.safetensors")
    with h5py.File(root / "states.h5", "w") as file:
        file.create_dataset("states", data=array)
    batches = []
    for start in range(0, len(array), SLICE_ROWS):
        part = array[start : start + SLICE_ROWS]
        batches.append(pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), WIDTH))
    rows = pa.chunked_array(batches)
    held = datasets.Dataset(pa.table({"states": rows}))
    held.save_to_disk(str(root / "arrow"))


# Reading it in every way --------------------------------------------------------------------------------------------


class Reader:
    """One way to read: consecutive rows into given memory or new memory, and rows by number."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def into(self, start: int, stop: int, out: Array) -> None:
        out[:] = self.fresh(start, stop)

    def fresh(self, start: int, stop: int) -> Array:
        raise NotImplementedError

    def take(self, numbers: NDArray[np.int64], out: Array) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass


class Memmap(Reader):
    def __init__(self, path: Path, rows: int) -> None:
        super().__init__(path)
        self.mapped = np.memmap(path, np.uint16, "r", shape=(rows, WIDTH))

    def into(self, start: int, stop: int, out: Array) -> None:
        np.copyto(out, self.mapped[start:stop])

    def fresh(self, start: int, stop: int) -> Array:
        return np.array(self.mapped[start:stop])

    def take(self, numbers: NDArray[np.int64], out: Array) -> None:
        np.take(self.mapped, numbers, axis=0, out=out, mode="clip")


class Ours(Reader):
    def __init__(self, path: Path, rows: int, layout_name: str) -> None:
        super().__init__(path)
        self.reader = RowReader(path / "states", rows_document(rows, WIDTH, SHARD_ROWS, FORM, LAYOUTS[layout_name]))

    def into(self, start: int, stop: int, out: Array) -> None:
        self.reader.stored(slice(start, stop), out=out)

    def fresh(self, start: int, stop: int) -> Array:
        rows: Array = self.reader.stored(slice(start, stop))
        return rows if rows.flags.writeable else rows.copy()  # a view is no work at all: not what is measured

    def take(self, numbers: NDArray[np.int64], out: Array) -> None:
        self.reader.stored(numbers, out=out)


class Safetensors(Reader):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        from safetensors import safe_open

        self.numpy = safe_open(path, framework="np").get_slice("states")
        self.mapped = safe_open(path, framework="pt").get_tensor("states")

    def fresh(self, start: int, stop: int) -> Array:
        rows: Array = self.numpy[start:stop]
        return rows

    def take(self, numbers: NDArray[np.int64], out: Array) -> None:
        import torch

        # uint16 tensors cannot be indexed; their bits can.
        signed = self.mapped.view(torch.int16)
        torch.index_select(signed, 0, torch.from_numpy(numbers), out=torch.from_numpy(out.view(np.int16)))


class HDF5(Reader):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        import h5py

        self.file = h5py.File(path, "r")
        self.data = self.file["states"]

    def into(self, start: int, stop: int, out: Array) -> None:
        self.data.read_direct(out, np.s_[start:stop])

    def fresh(self, start: int, stop: int) -> Array:
        rows: Array = self.data[start:stop]
        return rows

    def take(self, numbers: NDArray[np.int64], out: Array) -> None:
        ordered, places = np.unique(numbers, return_inverse=True)  # it takes rising numbers only
        np.take(self.data[ordered], places, axis=0, out=out, mode="clip")

    def close(self) -> None:
        self.file.close()


class Arrow(Reader):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        import datasets

        self.data = datasets.load_from_disk(str(path)).with_format("numpy", dtype=np.uint16)

    def fresh(self, start: int, stop: int) -> Array:
        rows: Array = self.data[start:stop]["states"]
        return rows

    def take(self, numbers: NDArray[np.int64], out: Array) -> None:
        out[:] = self.data[numbers]["states"]


class OtherInterpreter(Reader):
    """zarr-python of another Python than this one: it reads into a file in memory that both have mapped.

    What is timed is what it takes over there, with the answer that it is done.
    """

    def __init__(self, path: Path, python: Path) -> None:
        super().__init__(path)
        self.shared = tempfile.NamedTemporaryFile(dir="/dev/shm")  # noqa: SIM115 - closed with the reader
        most = max(SLICE_ROWS, RANDOM_ROWS)
        self.shared.truncate(most * WIDTH * 2)
        self.room = np.memmap(self.shared.name, np.uint16, "r", shape=(most, WIDTH))
        arguments = [str(python), "-c", _ELSEWHERE, str(path / "states"), self.shared.name, str(most), str(WIDTH)]
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own)
        if self._answer() != "ready":
            raise SystemExit(f"{python} does not open {path} with zarr-python")

    def _answer(self) -> str:
        return self.process.stdout.readline().strip() if self.process.stdout else ""

    def _ask(self, question: dict[str, Any]) -> None:
        if self.process.stdin is not None:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        if self._answer() != "done":
            raise SystemExit("the other interpreter stopped")

    def into(self, start: int, stop: int, out: Array) -> None:
        del out  # what both have mapped takes its place
        self._ask({"slice": [int(start), int(stop)]})

    def fresh(self, start: int, stop: int) -> Array:
        self.into(start, stop, self.room)
        return self.room[: stop - start]

    def take(self, numbers: NDArray[np.int64], out: Array) -> None:
        del out
        self._ask({"rows": numbers.tolist()})

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()
        self.shared.close()


#: What the other interpreter runs. States are bfloat16, which zarr-python does not know: it is told once, as uint16.
_ELSEWHERE = """
import json, sys
import numpy as np, zarr
from pathlib import Path
path, shared, rows, width = sys.argv[1:]
document = json.loads((Path(path) / "zarr.json").read_text()) | {"data_type": "uint16", "fill_value": 0}
store = zarr.storage.StorePath(zarr.storage.LocalStore(path, read_only=True), "")
array = zarr.Array.from_dict(store, document)
room = np.memmap(shared, np.uint16, "r+", shape=(int(rows), int(width)))
print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if "slice" in asked:
        start, stop = asked["slice"]
        room[: stop - start] = array[start:stop]
    else:
        numbers = np.array(asked["rows"])
        room[: len(numbers)] = array.oindex[numbers]
    print("done", flush=True)
"""


class StockZarr(Reader):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        import zarr

        self.data: Any = zarr.open_array(path / "states", mode="r")

    def fresh(self, start: int, stop: int) -> Array:
        rows: Array = self.data[start:stop]
        return rows

    def take(self, numbers: NDArray[np.int64], out: Array) -> None:
        out[:] = self.data.oindex[numbers]


# What is timed ------------------------------------------------------------------------------------------------------


class Workloads:
    """The ways of going through an array, for any reader.

    Args:
        rows: Rows of the array.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.slices = [(start, min(start + SLICE_ROWS, rows)) for start in range(0, rows, SLICE_ROWS)]
        self.buffer = np.zeros((max(SLICE_ROWS, RANDOM_ROWS), WIDTH), np.uint16)
        rng = np.random.default_rng(0)
        self.numbers = rng.integers(0, rows, RANDOM_ROWS)
        self.starts = rng.integers(0, rows // CHUNK_ROWS, RANDOM_ROWS // CHUNK_ROWS) * CHUNK_ROWS

    def sequential_buffer(self, reader: Reader) -> None:
        for start, stop in self.slices:
            reader.into(start, stop, self.buffer[: stop - start])

    def sequential_fresh(self, reader: Reader) -> None:
        for start, stop in self.slices:
            reader.fresh(start, stop)

    def random_rows(self, reader: Reader) -> None:
        reader.take(self.numbers, self.buffer[:RANDOM_ROWS])

    def random_chunks(self, reader: Reader) -> None:
        for start in self.starts:
            reader.into(start, start + CHUNK_ROWS, self.buffer[:CHUNK_ROWS])

    def named(self) -> dict[str, tuple[Callable[[Reader], None], float]]:
        """Workloads with the GiB of rows that each goes through."""
        gib = WIDTH * 2 / 2**30
        return {
            "sequential, buffer": (self.sequential_buffer, self.rows * gib),
            "sequential, fresh": (self.sequential_fresh, self.rows * gib),
            "random rows": (self.random_rows, RANDOM_ROWS * gib),
            "random chunks": (self.random_chunks, RANDOM_ROWS * gib),
        }


#: Interpreter whose zarr-python reads along, with its version; none unless `--zarr33-python` names one.
_OTHER: list[tuple[Path, str]] = []


def readers_of(root: Path, rows: int, *, peers: bool) -> dict[str, tuple[Path, Callable[[], Reader]]]:
    """Every way to read, with the files it reads."""
    found: dict[str, tuple[Path, Callable[[], Reader]]] = {
        "memmap": (root / "plain.bin", lambda: Memmap(root / "plain.bin", rows)),
        "hot": (root / "hot", lambda: Ours(root / "hot", rows, "hot")),
        "archive": (root / "archive", lambda: Ours(root / "archive", rows, "archive")),
    }
    if peers:
        found |= {
            "safetensors": (root / "states.safetensors", lambda: Safetensors(root / "states.safetensors")),
            "h5py": (root / "states.h5", lambda: HDF5(root / "states.h5")),
            "datasets (Arrow)": (root / "arrow", lambda: Arrow(root / "arrow")),
            "zarr-python on hot": (root / "hot", lambda: StockZarr(root / "hot")),
            "zarr-python on archive": (root / "archive", lambda: StockZarr(root / "archive")),
        }
    for python, version in _OTHER:
        for layout in LAYOUTS:
            open_ = partial(OtherInterpreter, root / layout, python)
            found[f"zarr-python {version} on {layout}"] = (root / layout, open_)
    return found


def other_zarr(python: Path) -> tuple[Path, str]:
    """An interpreter and the version of its zarr-python."""
    say = "import sys, zarr; print(zarr.__version__, sys.version.split()[0])"
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    asked = subprocess.run([python, "-c", say], capture_output=True, text=True, check=False, env=own)
    if asked.returncode:
        raise SystemExit(f"{python} has no zarr-python: {asked.stderr.strip().splitlines()[-1]}")
    version, of = asked.stdout.split()
    return python, f"{version} (Python {of})"


def check(readers: dict[str, Reader], work: Workloads, array: Array) -> None:
    """Everybody reads the rows that were written."""
    start, stop = work.slices[-1]
    for name, reader in readers.items():
        part, taken = np.zeros((stop - start, WIDTH), np.uint16), np.zeros((RANDOM_ROWS, WIDTH), np.uint16)
        reader.into(start, stop, part)
        reader.take(work.numbers, taken)
        same = [np.array_equal(part, array[start:stop]), np.array_equal(taken, array[work.numbers])]
        if isinstance(reader, OtherInterpreter):
            reader.take(work.numbers, taken)
            same = [np.array_equal(reader.room[:RANDOM_ROWS], array[work.numbers])]
            part = array[start:stop]
        if not all([*same, np.array_equal(reader.fresh(start, stop), part)]):
            raise SystemExit(f"{name} reads other rows than were written")


Figures = dict[str, dict[str, dict[str, Any]]]


def read_warm(root: Path, array: Array, runs: int, *, peers: bool) -> Figures:
    """Open readers, files in memory; the round that does not count also verifies every checksum of the hot layout."""
    work = Workloads(len(array))
    readers = {name: open_() for name, (_, open_) in readers_of(root, len(array), peers=peers).items()}
    check(readers, work, array)
    result = {}
    for title, (run, gib) in work.named().items():
        taken = interleaved({name: lambda r=reader, f=run: f(r) for name, reader in readers.items()}, runs)
        result[title] = figures(taken, "memmap", gib)
        for name, of in result[title].items():
            if "safetensors" in taken:
                of["over safetensors"] = by_round(taken, "safetensors")[name]
    for reader in readers.values():
        reader.close()
    return result


def read_cold(root: Path, rows: int, runs: int, *, peers: bool) -> tuple[Figures, dict[str, float]]:
    """Readers opened within the time that counts, their files dropped from memory just before."""
    work = Workloads(rows)
    readers = readers_of(root, rows, peers=peers)
    left: dict[str, float] = dict.fromkeys(readers, 0.0)

    def forget(name: str) -> None:
        left[name] = max(left[name], drop_from_cache(readers[name][0]))

    def once(open_: Callable[[], Reader], run: Callable[[Reader], None]) -> None:
        reader = open_()
        run(reader)
        reader.close()

    result = {}
    for title, (run, gib) in work.named().items():
        if title == "sequential, fresh":
            continue
        contenders = {name: lambda o=open_, f=run: once(o, f) for name, (_, open_) in readers.items()}
        result[title] = figures(interleaved(contenders, runs, before=forget, warm_up=False), "memmap", gib)
    return result, left


def write_all(root: Path, array: Array, runs: int, *, peers: bool) -> dict[str, dict[str, Any]]:
    """The same rows written and fsynced in every way."""
    contenders: dict[str, Callable[[], object]] = {
        "plain": lambda: write_plain(root / "plain", array),
        "hot": lambda: write_ours(root / "hot", array, "hot"),
        "archive": lambda: write_ours(root / "archive", array, "archive"),
    }
    if peers:
        contenders |= {
            "zarr-python, as hot": lambda: write_zarr(root / "zarr-hot", array, "hot"),
            "zarr-python, as archive": lambda: write_zarr(root / "zarr-archive", array, "archive"),
        }

    def clear(_: str) -> None:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        os.sync()

    taken = interleaved(contenders, runs, before=clear)
    return figures(taken, "plain", array.nbytes / 2**30)


def parts(root: Path, array: Array) -> dict[str, float]:
    """What the figures are made of, in GiB of rows a second: the best of three."""
    some = np.ascontiguousarray(array[:SLICE_ROWS])
    raw, gib = some.tobytes(), some.nbytes / 2**30
    target = np.zeros_like(some)
    archive = LAYOUTS["archive"]
    packed = [encode_chunk(some[i : i + CHUNK_ROWS], archive) for i in range(0, len(some), CHUNK_ROWS)]
    work: dict[str, Callable[[], object]] = {
        "copy": lambda: np.copyto(target, some),
        "copy into new memory": some.copy,
        "crc32c of chunks": lambda: crc32c(raw),
        "crc32 of files": lambda: file_checksum(raw),
        "decompress": lambda: [decode_chunk(memoryview(p), FORM.storage, archive, "a chunk") for p in packed],
        "compress": lambda: [encode_chunk(some[i : i + CHUNK_ROWS], archive) for i in range(0, len(some), CHUNK_ROWS)],
        "encode a hot shard": lambda: encode_shard(some, SLICE_ROWS, LAYOUTS["hot"]),
    }
    found = {name: gib / min(seconds(call) for _ in range(3)) for name, call in work.items()}
    drop_from_cache(root / "plain.bin")
    found["read the disk"] = array.nbytes / 2**30 / seconds((root / "plain.bin").read_bytes)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the array as plain rows")
    parser.add_argument("--tokens", type=int, default=16_384, help="real tokens that it is made of")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cold-runs", type=int, default=3)
    parser.add_argument("--ours-only", action="store_true", help="leave the other libraries out")
    parser.add_argument("--directory", type=Path, help="where to write; by default a temporary directory")
    parser.add_argument("--json", action="store_true", help="one line instead of tables")
    parser.add_argument("--out", type=Path, help="directory of the result file; by default benchmarks/results")
    parser.add_argument(
        "--zarr33-python", type=Path, help="a Python of 3.12 or later whose zarr-python 3.3 reads along"
    )
    arguments = parser.parse_args()
    if arguments.zarr33_python is not None:
        _OTHER.append(other_zarr(arguments.zarr33_python))
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        result = measure(arguments, Path(name))
    path = keep("bench_store", result, *([arguments.out] if arguments.out else []))
    print(json.dumps(result) if arguments.json else f"{text_of(result)}\nwritten to {path}")


def measure(arguments: argparse.Namespace, root: Path) -> dict[str, Any]:
    peers = not arguments.ours_only
    result: dict[str, Any] = {
        "machine": machine(),
        "versions": versions_of(
            "numpy", "zarr", "numcodecs", "google-crc32c", "safetensors", "h5py", "datasets", "pyarrow", "torch"
        ),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "zarr33": _OTHER[0][1] if _OTHER else "missing: it needs Python 3.12 (--zarr33-python)",
    }
    rows = max(round(arguments.gib * 2**30 / (WIDTH * 2) / SHARD_ROWS), 1) * SHARD_ROWS
    states = real_states(arguments.tokens)
    array = np.concatenate([wide_rows(states, start, 1024) for start in range(0, rows, 1024)])
    result |= {"rows": rows, "width": WIDTH, "gib": array.nbytes / 2**30, "real_tokens": states.shape[1]}
    result["write"] = write_all(root / "written", array, arguments.runs, peers=peers)
    shutil.rmtree(root / "written")
    write_plain(root / "plain.bin", array)
    for layout in LAYOUTS:
        write_ours(root / layout, array, layout)
    if peers:
        write_peers(root, array)
    stored = {name: sum(p.stat().st_size for p in (root / name).rglob("*") if p.is_file()) for name in LAYOUTS}
    result["times_smaller"] = {name: array.nbytes / size for name, size in stored.items()}
    result["warm"] = read_warm(root, array, arguments.runs, peers=peers)
    result["cold"], result["still_cached"] = read_cold(root, rows, arguments.cold_runs, peers=peers)
    result["parts"] = parts(root, array)
    warm, cold = result["warm"], result["cold"]
    buffer, fresh, rows_at_random = (warm[name] for name in ("sequential, buffer", "sequential, fresh", "random rows"))
    decoded = result["parts"]["decompress"] * result["machine"]["cores"]
    goals = {
        "reading hot, into a buffer, over memmap": at_least(0.95, *buffer["hot"]["rounds"]),
        "reading hot, into a buffer, over memmap, worst round": at_least(0.95, min(buffer["hot"]["rounds"])),
        "reading hot, new memory, over memmap": at_least(0.95, *fresh["hot"]["rounds"]),
        "reading hot, random rows, over memmap": at_least(1.0, *rows_at_random["hot"]["rounds"]),
        "archive, times smaller": at_least(1.42, result["times_smaller"]["archive"]),
        "archive, warm, into a buffer, over memmap": at_least(0.35, *buffer["archive"]["rounds"]),
        "archive, warm, over what the cores decode": at_least(0.8, buffer["archive"]["rate"] / decoded),
        "archive, cold, over memmap": at_least(1.3, *cold["sequential, buffer"]["archive"]["rounds"]),
        "writing hot, over a plain file with fsync": at_least(0.9, *result["write"]["hot"]["rounds"]),
    }
    if peers:
        goals["reading hot, random rows, over safetensors"] = at_least(0.9, *rows_at_random["hot"]["over safetensors"])
    result["goals"] = recorded(goals)
    return result


def text_of(result: dict[str, Any]) -> str:
    """The result for people."""
    host = result["machine"]
    lines = [
        f"{result['rows']} rows of {WIDTH} bfloat16, {result['gib']:.2f} GiB, of {result['real_tokens']} real tokens",
        f"{host['cpu']}, {host['cores']} cores, load {host['load_before']}",
    ]
    lines += [table(f"warm: {title}", rows, "GiB/s") for title, rows in result["warm"].items()]
    lines += [table(f"cold: {title}", rows, "GiB/s") for title, rows in result["cold"].items()]
    kept = {name: share for name, share in result["still_cached"].items() if share > 0.01}
    lines.append(f"  of the files meant to be cold, still in memory at worst: {kept or 'less than 1 % of each'}")
    lines.append(table("write, with fsync", result["write"], "GiB/s"))
    if not _OTHER:
        lines.append("zarr-python 3.3 was not measured: it needs Python 3.12 (--zarr33-python)")
    lines.append("parts, GiB/s: " + ", ".join(f"{name} {rate:.2f}" for name, rate in result["parts"].items()))
    lines.append(judged(result["goals"]))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
