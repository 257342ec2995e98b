"""Pairs a second of the pair loader, against fancy indexing of a plain numpy memmap: the same rows in the same order.

    python benchmarks/bench_loader.py --rows 65536 --width 4096 --json

Both give float32 batches. The files are written first and so are warm; the memmap is one flat file of bfloat16 a side,
without chunks, checksums or a bound on memory. Median of interleaved runs.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from featstore.runtime.provenance import versions
from featstore.store.format.documents import rows_document
from featstore.store.format.dtypes import bfloat16_values
from featstore.store.format.elements import FORMATS
from featstore.store.format.shards import LAYOUTS, encode_shard
from featstore.store.read.loader import MEMORY, SHARD_ROWS, PairBatches
from featstore.store.read.pairs import Pairs
from featstore.store.read.rows import RowReader

FORM = FORMATS["bfloat16"]


def states(rows: int, width: int, seed: int) -> np.ndarray:
    """Stored rows (rows, width) whose columns differ in size, as those of a residual stream do."""
    rng = np.random.default_rng(seed)
    stored = np.empty((rows, width), FORM.storage)
    scale = np.exp(rng.standard_normal(width, np.float32))
    for start in range(0, rows, 1024):
        part = rng.standard_normal((min(1024, rows - start), width), np.float32) * scale
        stored[start : start + len(part)] = FORM.encode(part).stored
    return stored


def write(path: Path, stored: np.ndarray, layout_name: str) -> RowReader:
    layout = LAYOUTS[layout_name]
    for shard, start in enumerate(range(0, len(stored), SHARD_ROWS)):
        file = path / "c" / str(shard) / "0"
        file.parent.mkdir(parents=True)
        file.write_bytes(encode_shard(stored[start : start + SHARD_ROWS], SHARD_ROWS, layout))
    return RowReader(path, rows_document(*stored.shape, SHARD_ROWS, FORM, layout))


def pairs_of(rows: int) -> Pairs:
    """Nine of ten rows, as after pairing and masking."""
    number = np.flatnonzero(np.random.default_rng(0).random(rows) < 0.9)
    m = len(number)
    zeros = np.zeros(m, np.uint8)
    return Pairs(
        "a",
        "b",
        number,
        number,
        zeros,
        (number // 512).astype(np.int32),
        np.zeros(m, bool),
        zeros,
        np.zeros(m, np.int32),
        (0.9, 0.9),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32_768)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--memory", type=int, default=MEMORY)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where to write; by default a temporary directory")
    parser.add_argument("--json", action="store_true", help="one line instead of an indented object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        result = measure(arguments, Path(name))
    print(json.dumps(result, indent=None if arguments.json else 2))


def measure(arguments: argparse.Namespace, root: Path) -> dict:
    pairs = pairs_of(arguments.rows)
    readers: dict[str, list[RowReader]] = {name: [] for name in LAYOUTS}
    plain: list[np.ndarray] = []
    for seed, side in enumerate("ab"):
        stored = states(arguments.rows, arguments.width, seed)
        stored.tofile(root / f"{side}.bin")
        plain.append(np.memmap(root / f"{side}.bin", FORM.storage, "r", shape=stored.shape))
        for layout in LAYOUTS:
            readers[layout].append(write(root / f"{side}-{layout}", stored, layout))
    loaders = {name: PairBatches(*both, pairs, arguments.memory) for name, both in readers.items()}
    size = arguments.batch_size

    def load(layout: str, epoch: int) -> float:
        start = time.perf_counter()
        for _ in loaders[layout].shuffled(size, 0, epoch):
            pass
        return time.perf_counter() - start

    def index(epoch: int) -> float:
        order = loaders["hot"].order(size, 0, epoch)
        numbers = np.concatenate([order.buffer(k) for k in range(-(-len(order) // order.buffer_pairs))])
        start = time.perf_counter()
        for at in range(0, len(numbers), size):
            rows = pairs.row_source[numbers[at : at + size]]
            for side in plain:
                bfloat16_values(side[rows])
        return time.perf_counter() - start

    seconds: dict[str, list[float]] = {"memmap": [], **{name: [] for name in LAYOUTS}}
    for run in range(arguments.runs + 1):
        taken = {"memmap": index(run), **{name: load(name, run) for name in LAYOUTS}}
        if run:  # the first maps files and checks their checksums
            for name, value in taken.items():
                seconds[name].append(value)
    rate = {name: len(pairs) / statistics.median(values) for name, values in seconds.items()}
    return {
        "device": platform.processor() or platform.machine(),
        "versions": versions(),
        "rows": arguments.rows,
        "width": arguments.width,
        "batch_size": size,
        "memory": arguments.memory,
        "buffer_pairs": loaders["hot"].order(size, 0, 1).buffer_pairs,
        "pairs_per_second": rate,
        "spread": {name: [len(pairs) / max(values), len(pairs) / min(values)] for name, values in seconds.items()},
        "ratio_to_memmap": {name: rate[name] / rate["memmap"] for name in LAYOUTS},
    }


if __name__ == "__main__":
    main()
