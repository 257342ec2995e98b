"""All closed forms of five layers by five from one scan, against that scan alone.

    OMP_NUM_THREADS=2 python benchmarks/bench_closed.py --width 256 --rows 64000

The scan reads the rows of a synthetic store and makes the sums of all 25 layer pairs; then Procrustes, the ridge path
and reduced rank are solved for each. Wanted: both together take at most 1.3 times the scan where rows are 250 times the
width, and at most twice where they are 20 times. Peers, where they are installed, solve one layer pair on the same
rows. Interleaved rounds, median.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from _measure import at_most, figures, interleaved, judged, keep, machine, recorded, table, versions_of

from align.closed_form.fit import Fit, fit_closed
from align.closed_form.fit_all import fit_all
from align.layers import LayerPair
from align.moments.scan import Scan, scan
from featstore.store import Store, open_store

sys.path.insert(0, str(Path(__file__).parents[1]))

LAYERS = range(1, 6)
PAIRS = [LayerPair("a", (i,), "b", j) for i in LAYERS for j in LAYERS]
FITS = {"procrustes": Fit("procrustes"), "ridge path": Fit("affine"), "reduced rank": Fit("reduced-rank", rank=32)}
WANTED = 1.3
#: At 20 rows a dimension, where fits weigh more.
WANTED_SMALL = 2.0


def synthetic(path: Path, rows: int, width: int) -> Store:
    """Layers that share a core, so that every pair has something to fit."""
    from tests.support.planted import plant

    rng = np.random.default_rng(0)
    scale = np.arange(1, width + 1, dtype=np.float32) ** -0.5
    core = rng.standard_normal((rows, width), np.float32) * scale
    sides = []
    for _ in range(2):
        turn = [rng.standard_normal((width, width), np.float32) / np.sqrt(width) for _ in LAYERS]
        noise = (0.1 * rng.standard_normal((rows, width), np.float32) for _ in LAYERS)
        sides.append({k: core @ t + e for k, t, e in zip(LAYERS, turn, noise, strict=True)})
    return open_store(plant(path, *sides, form="bfloat16").path)


def solve(moments: dict[str, Scan], fits: dict[str, Fit]) -> None:
    fit_all(fits, PAIRS, moments)


def measure(rows: int, width: int, runs: int, directory: Path) -> dict[str, Any]:
    store = synthetic(directory / f"{width}-{rows}.zarr", rows, width)
    pairs = store.pairs("a", "b").select()
    moments = scan(store, pairs, PAIRS)
    contenders = {
        "scan": lambda: scan(store, pairs, PAIRS),
        "scan and all fits": lambda: solve(scan(store, pairs, PAIRS), FITS),
        **{name: lambda fit=fit: solve(moments, {"": fit}) for name, fit in FITS.items()},
    }
    taken = interleaved(contenders, runs)
    ratio = statistics.median(b / a for a, b in zip(taken["scan"], taken["scan and all fits"], strict=True))
    train = int((pairs.split == 0).sum())
    print(table(f"{rows} rows, width {width}", figures(taken, "scan", 1), "runs/s"), flush=True)
    return {"rows": rows, "train_rows": train, "width": width, "rows_per_width": rows / width,
            "seconds": taken, "ratio": ratio, "peers": peers(store, moments, runs)}  # fmt: skip


def peers(store: Store, moments: dict[str, Scan], runs: int) -> dict[str, Any]:
    """One layer pair: theirs from rows in memory, ours from moments, which the scan made."""
    pair = PAIRS[0]
    pairs = store.pairs("a", "b").select(0)
    x, y = store.rows("a", 1)[pairs.row_source], store.rows("b", 1)[pairs.row_target]
    x, y = x - x.mean(0), y - y.mean(0)
    lambdas = np.logspace(-6, 1, 15) * float(np.square(x, dtype=np.float64).sum()) / x.shape[1]
    contenders = {
        f"ours: {name}": lambda fit=fit: fit_closed(fit, pair, moments[pair.key]) for name, fit in FITS.items()
    }
    missing = {}
    from scipy.linalg import orthogonal_procrustes

    contenders["scipy: Procrustes from rows"] = lambda: orthogonal_procrustes(x, y)
    try:
        ridge = importlib.import_module("himalaya.ridge")
        contenders["himalaya: RidgeCV from rows"] = lambda: ridge.RidgeCV(alphas=lambdas, cv=5).fit(x, y)
    except ImportError as error:
        missing["himalaya"] = f"not installed ({error})"
    try:
        importlib.import_module("latentis")
        svd = importlib.import_module("latentis.transform.translate.functional").svd_align_state
        import torch

        contenders["latentis: Procrustes from rows"] = lambda: svd(torch.from_numpy(x), torch.from_numpy(y))
    except (ImportError, AttributeError) as error:
        missing["latentis"] = f"not installed ({error})"
    return {"seconds": interleaved(contenders, runs), "missing": missing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rows", type=int, help="of the large store; 250 times the width if not given")
    parser.add_argument("--small", type=int, help="rows of the small store; 20 times the width if not given")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where to write; by default a temporary directory")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/bench_closed.json")
    parser.add_argument("--json", action="store_true", help="print the result as one line")
    arguments = parser.parse_args()
    sizes = [arguments.rows or 250 * arguments.width, arguments.small or 20 * arguments.width]
    before = machine()
    # The writer's fsync is not what is measured.
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name, mock.patch("os.fsync"):
        measured = [measure(rows, arguments.width, arguments.runs, Path(name)) for rows in sizes]
    result = {
        "device": {**before, "threads": os.environ.get("OMP_NUM_THREADS", "all")},
        "versions": versions_of("featstore", "numpy", "scipy", "threadpoolctl", "himalaya", "latentis", "torch"),
        "layer_pairs": len(PAIRS),
        "measured": measured,
    }
    large, small = (one["ratio"] for one in measured)
    for name, spent in measured[0]["peers"]["seconds"].items():
        print(f"  one layer pair, {name:32} {statistics.median(spent):8.3f} s")
    for name, reason in measured[0]["peers"]["missing"].items():
        print(f"  {name}: {reason}")
    goals = recorded(
        {
            f"scan and fits of {len(PAIRS)} layer pairs over the scan, {rows} rows": at_most(wanted, ratio)
            for rows, wanted, ratio in ((sizes[0], WANTED, large), (sizes[1], WANTED_SMALL, small))
        }
    )
    result["goals"] = goals
    print(judged(goals))
    if arguments.json:
        print(json.dumps(result))
    if arguments.keep:
        print(keep("bench_closed", result))


if __name__ == "__main__":
    main()
