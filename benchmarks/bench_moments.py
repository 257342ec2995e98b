"""What stored moments take, and what their 24 bits do to figures: R2 of closed forms, debiased CKA.

    python benchmarks/bench_moments.py                            # width 512, spectra of several kinds
    python benchmarks/bench_moments.py --width 4096 --layers 5 --kinds steep    # 55 blocks, as the goal has them

Two models of a few layers each share a core, with noise; their states lie in a store in bfloat16. Moments are added to
it; the figures of fits to what is stored are compared with those of fits to sums in memory over the same rows, made as
before moments were packed (float32 products, float64 totals). `rounding` is the same difference between those sums and
ones with float64 products: what float32 products alone do. Wanted: 1e-6 for every figure, and 8 GB for three splits of
55 blocks at width 4096; smaller runs print what their bytes an element come to at that size.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from _measure import at_most, judged, keep, machine, recorded, seconds, versions_of

from align.closed_form.fit import Fit, fit_closed
from align.layers import LayerPair
from align.moments.scan import Scan
from align.moments.scatter import about, centered
from align.scoring.moments import score_moments
from align.solvers.ridge import RidgePath
from featstore.store import Store, open_store
from featstore.store.format.packed import TILE
from featstore.store.moments.stored import CUT_ROWS, StoredMoments
from featstore.store.moments.sums import BlockSums, Moments, assemble, products
from featstore.store.moments.writing import add_moments

sys.path.insert(0, str(Path(__file__).parents[1]))

#: Rows over width, and how fast the spread of directions falls off.
KINDS: dict[str, tuple[float, float]] = {
    "flat": (4, 0.5),
    "steep": (5.3, 1.0),
    "loud column": (4, 1.0),
    "few rows": (0.6, 1.0),
    "many rows": (20, 1.0),
}
#: Rows do not determine a rotation of more dimensions than there are rows; nothing is promised of its figures.
UNDETERMINED = "few rows"
FITS = {
    "procrustes": Fit("procrustes", scale=True),
    "affine": Fit("affine"),
    "reduced rank": Fit("reduced-rank", rank=32),
}
#: Relative ridge strengths at which R2 is compared beside the one that validation rows choose.
STRENGTHS = (1e-6, 1e-4, 1e-2)
X, Y = ("a", 1), ("b", 1)
#: Elements of three splits of 55 blocks at width 4096, a symmetric block for half; and bytes of the vectors beside.
ELEMENTS = 3 * (45 + 10 * 17 / 32) * 4096**2
VECTORS = 3 * 55 * 8 * (6 * 4096 + 4)
WANTED_BYTES, WANTED_FIGURES = 8e9, 1e-6


def synthetic(path: Path, kind: str, width: int, layers: int) -> Store:
    """Layers that share a core of a kind, the last of every model with the core turned."""
    from tests.support.planted import plant

    ratio, decay = KINDS[kind]
    rows = int(ratio * width * 1.25)
    rng = np.random.default_rng(0)
    spread = np.arange(1, width + 1, dtype=np.float32) ** -decay
    core = rng.standard_normal((rows, width), np.float32) * spread
    core = core @ np.linalg.qr(rng.standard_normal((width, width), np.float32))[0]
    size = float(np.linalg.norm(spread)) / np.sqrt(width)
    sides = []
    for _ in range(2):
        states = {}
        for layer in range(1, layers + 1):
            turn = np.linalg.qr(rng.standard_normal((width, width), np.float32))[0]
            states[layer] = core @ turn + 0.3 * size * rng.standard_normal((rows, width), np.float32)
            if kind == "loud column":
                states[layer][:, 3] = 100 * size * rng.standard_normal(rows)
                states[layer][:, 5] += 50 * size
        sides.append(states)
    return open_store(plant(path, *sides, form="bfloat16", documents=80, sink_threshold=1e9).path)


def in_memory(store: Store, dtype: type[np.floating[Any]]) -> list[Moments]:
    """Moments of a layer pair by split, from sums over rows with products of a type."""
    found = []
    for split in range(3):
        part = store.pairs("a", "b").select(split)
        sums = BlockSums(
            {site: store.origin(*site) for site in (X, Y)},
            [(X, X), (Y, Y), (X, Y)],
            block_rows=CUT_ROWS,
            dtype=dtype,
            multiply=products,
        )
        sums.add({X: store.rows(*X)[part.row_source], Y: store.rows(*Y)[part.row_target]})
        blocks = sums.blocks()
        found.append(assemble(sums.origins[X], sums.origins[Y], blocks[X, Y], blocks[X, X], blocks[Y, Y]))
    return found


def figures(train: Moments, val: Moments, test: Moments) -> dict[str, float]:
    """R2 on test of every fit, and debiased CKA of what keeps distances."""
    scan, pair = Scan(train, val), LayerPair("a", (1,), "b", 1)
    maps = {name: fit_closed(fit, pair, scan) for name, fit in FITS.items()}
    found = {}
    for name, (scores, _) in score_moments(test, maps).items():
        assert scores is not None
        found[f"{name} R2"] = float(scores["r2"])
        if scores["cka_debiased_rows"] is not None:
            found[f"{name} CKA"] = float(scores["cka_debiased_rows"])
    centre = centered(train)
    path, rows = RidgePath(centre.gx, centre.c), about(test, centre.mean_x, centre.mean_y)
    total = float(np.trace(rows.gy)) / rows.n / len(rows.gy)
    for strength, error in zip(STRENGTHS, path.mse(rows, STRENGTHS), strict=True):
        found[f"ridge {strength:g} R2"] = 1 - float(error) / total
    return found


def differences(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: abs(one[name] - other[name]) for name in one}


def measure(kind: str, width: int, layers: int, directory: Path) -> dict[str, Any]:
    store = synthetic(directory / f"{kind}.zarr", kind, width, layers)
    took = seconds(lambda: add_moments(store.path, quiet=True))
    store = open_store(store.path)
    stored = StoredMoments(store, "a", "b")
    kept = [stored.read(X, Y, split) for split in range(3)]
    before, exact = (figures(*in_memory(store, dtype)) for dtype in (np.float32, np.float64))
    packed = figures(*[moments for moments in kept if moments is not None])
    files = [file for file in (store.path / "moments").rglob("*") if file.is_file() and file.name != "zarr.json"]
    products_alone = sum(file.stat().st_size for file in files if "correlation" in file.parts)
    tiles = -(-width // TILE)
    half = sum(width * min(TILE, width - TILE * tile) for tile in range(tiles)) * (tiles + 1) / (2 * tiles)
    elements = 3 * (layers * (2 * layers - 1) * width**2 + 2 * layers * half)
    return {
        "kind": kind,
        "rows": len(stored.pairs),
        "seconds": took,
        "bytes": sum(file.stat().st_size for file in files),
        "bytes_as_float64": 3 * 8 * layers * (2 * layers + 1) * width**2,
        "bytes_an_element": products_alone / elements,
        "figures": packed,
        "difference": differences(packed, before),
        "rounding": differences(before, exact),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2, help="of each model")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of spectra and numbers of rows")
    parser.add_argument("--directory", type=Path, help="where to write; by default a temporary directory")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/bench_moments.json")
    arguments = parser.parse_args()
    before, measured = machine(), []
    for kind in arguments.kinds.split(","):
        if kind not in KINDS:
            raise SystemExit(f"--kinds {kind}: there is no such kind; choose of {', '.join(KINDS)}")
        # The writer's fsync is not what is measured.
        with tempfile.TemporaryDirectory(dir=arguments.directory) as name, mock.patch("os.fsync"):
            one = measure(kind, arguments.width, arguments.layers, Path(name))
        measured.append(one)
        share, whole = one["bytes"] / one["bytes_as_float64"], one["bytes_an_element"] * ELEMENTS + VECTORS
        print(
            f"{kind}, {one['rows']} pairs of width {arguments.width}: {one['bytes'] / 1e6:.1f} MB in "
            f"{one['seconds']:.1f} s, {share:.3f} of float64; {one['bytes_an_element']:.2f} bytes an element, "
            f"{whole / 1e9:.2f} GB for 55 blocks at width 4096 (wanted {WANTED_BYTES / 1e9:g})"
        )
        for figure, value in one["figures"].items():
            off, rounding = one["difference"][figure], one["rounding"][figure]
            late = "" if off <= WANTED_FIGURES else f"   more than {WANTED_FIGURES:g}"
            print(f"  {figure:18} {value:10.6f}   off by {off:.0e}   rounding {rounding:.0e}{late}", flush=True)
    sizes = [one["bytes_an_element"] * ELEMENTS + VECTORS for one in measured]
    posed = [
        off
        for one in measured
        for figure, off in one["difference"].items()
        if one["kind"] != UNDETERMINED and not figure.startswith("ridge ")
    ]
    goals = recorded(
        {
            "moments: GB of 55 blocks, three splits, width 4096": at_most(WANTED_BYTES / 1e9, max(sizes) / 1e9),
            "moments: largest difference of a figure": at_most(WANTED_FIGURES, *posed),
        }
    )
    print(judged(goals))
    if arguments.keep:
        result = {
            "goals": goals,
            "device": before,
            "versions": versions_of("featstore", "numpy", "scipy", "numcodecs"),
            "width": arguments.width,
            "layers": arguments.layers,
            "measured": measured,
        }
        print(keep("bench_moments", result))


if __name__ == "__main__":
    main()
