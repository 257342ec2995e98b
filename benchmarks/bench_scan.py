"""The streamed scan of five layers by five against its bare products, made from rows that are in memory already.

    OMP_NUM_THREADS=1 python benchmarks/bench_scan.py --width 256 --rows 65536

The scan opens a synthetic bfloat16 store, reads and centres its rows, sums all that debiased CKA of 10 layers takes
on threads, one per core, and adds the parts up. The bare products are the same 55 blocks, as one symmetric
float32 product of the same cuts, on as many threads. Wanted: the scan over all pairs of rows (`debiased-rows`) takes at
most 1.2 times as long, and the scan over documents (`debiased`) at most 1.3 times as long as that. The peak of
memory that is the scan's own (not mapped files) is taken in a process of its own, at two numbers of rows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from _measure import at_most, figures, interleaved, judged, keep, machine, recorded, table, versions_of
from bench_closed import LAYERS, synthetic
from scipy.linalg.blas import ssyrk
from threadpoolctl import threadpool_limits

from align.execution.threads import Threads
from align.similarity.scan.partials import Rows
from align.similarity.scan.planning import CUT_ROWS, MEMORY, Selection, Site, plan
from align.similarity.scan.streaming import stream
from align.solvers.row_effects import in_order
from featstore.store import Store, open_store

WANTED = 1.2
WANTED_DOCUMENTS = 1.3
SITES = [Site("a", k, source=True) for k in LAYERS] + [Site("b", k, source=False) for k in LAYERS]


def selection_of(store: Store) -> Selection:
    return Selection(str(store.directory.resolve()), store.fingerprint, "a", "b", "end", keep_sinks=False)


def side_by_side(store: Store) -> Rows:
    """All layers' centred rows, ``(n, 10 widths)``."""
    pairs = store.pairs("a", "b").select()
    return np.concatenate(
        [
            store.rows(s.model, s.layer)[pairs.row_source if s.source else pairs.row_target]
            - store.origin(s.model, s.layer).astype(np.float32)
            for s in SITES
        ],
        axis=1,
    )


def bare(z: Rows) -> None:
    """Nothing but the products, each cut on one thread."""
    cores = len(os.sched_getaffinity(0))
    with threadpool_limits(1), ThreadPoolExecutor(cores) as pool:
        for _ in pool.map(lambda at: ssyrk(1.0, z[at : at + CUT_ROWS].T) is None, range(0, len(z), CUT_ROWS)):
            pass


def own_memory() -> int:
    """Bytes of this process that are not mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def peak(path: Path) -> None:
    """Scan a store and print the highest memory of this process above what it held before."""
    store = open_store(path)
    highest, done = 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.01):
            highest = max(highest, own_memory())

    with Threads() as threads:
        before = own_memory()
        watcher = threading.Thread(target=watch)
        watcher.start()
        stream(selection_of(store), SITES, executor=threads, quiet=True)
        done.set()
        watcher.join()
    print(max(highest - before, 0))


def peak_of(path: Path) -> int:
    words = [sys.executable, __file__, "--peak-of", str(path)]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def measure(rows: int, width: int, runs: int, directory: Path) -> dict[str, Any]:
    stores = {n: synthetic(directory / f"{n}.zarr", n, width) for n in (rows, 2 * rows)}
    store = stores[rows]
    z = side_by_side(store)
    with Threads() as threads:
        contenders = {
            "bare products": lambda: bare(z),
            "scan": lambda: stream(selection_of(store), SITES, executor=threads, estimator="debiased-rows", quiet=True),
            "over documents": lambda: stream(selection_of(store), SITES, executor=threads, quiet=True),
        }
        taken = interleaved(contenders, runs)
    print(table(f"{len(z)} pairs, width {width}", figures(taken, "bare products", 1), "runs/s"), flush=True)
    ratio = statistics.median(b / a for a, b in zip(taken["bare products"], taken["scan"], strict=True))
    documents = statistics.median(b / a for a, b in zip(taken["scan"], taken["over documents"], strict=True))
    sizes = in_order(store.pairs("a", "b").select().document)[1]
    planned = plan([width] * len(SITES), len(z), documents=sizes)
    peaks = {str(n): peak_of(store.directory) for n, store in stores.items()}
    return {"rows": rows, "pairs": len(z), "width": width, "seconds": taken, "ratio": ratio,
            "documents": len(sizes.sizes), "documents_over_rows": documents, "peak_bytes": peaks,
            "memory_allowed": MEMORY, "memory_planned": planned.memory, "slots": planned.slots}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument(
        "--rows", type=int, default=65_536, help="of the timed store; memory is measured at twice that, too"
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where to write; by default a temporary directory")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/bench_scan.json")
    parser.add_argument("--json", action="store_true", help="print the result as one line")
    parser.add_argument("--peak-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of is not None:
        peak(arguments.peak_of)
        return
    before, start = machine(), time.perf_counter()
    # The writer's fsync is not what is measured.
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name, mock.patch("os.fsync"):
        measured = measure(arguments.rows, arguments.width, arguments.runs, Path(name))
    result = {
        "device": {**before, "threads": os.environ.get("OMP_NUM_THREADS", "all")},
        "versions": versions_of("featstore", "numpy", "scipy", "dask", "distributed"),
        "seconds_in_all": time.perf_counter() - start,
        **measured,
    }
    small, large = (measured["peak_bytes"][str(n)] for n in (arguments.rows, 2 * arguments.rows))
    goals = recorded(
        {
            "scan over the bare products": at_most(WANTED, measured["ratio"]),
            f"scan over {measured['documents']} documents over one over rows": at_most(
                WANTED_DOCUMENTS, measured["documents_over_rows"]
            ),
        }
    )
    result["goals"] = goals
    print(judged(goals))
    print(f"peak memory: {small / 2**20:.0f} MiB at {arguments.rows} rows, {large / 2**20:.0f} at twice as many; "
          f"planned at most {measured['memory_planned'] / 2**20:.0f}, allowed {MEMORY / 2**20:.0f}")  # fmt: skip
    if arguments.json:
        print(json.dumps(result))
    if arguments.keep:
        print(keep("bench_scan", result))


if __name__ == "__main__":
    main()
