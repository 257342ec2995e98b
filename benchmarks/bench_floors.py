"""What floors cost: both of them, 39 exchanges each, over the time of the measure itself, for every measure.

    OMP_NUM_THREADS=2 python benchmarks/bench_floors.py --keep

5 x 5 layers of width 576 over 8192 rows of 64 documents, of which floors take 4096 at most; measures that decompose
something in every exchange are
compared over the rows that their floors use (2048), of two layers a model. The measure runs over all pairs of layers,
within models and between, with draws for its intervals, as `align cka --measures` runs it. Wanted is at most four times
the time of the measure for CKA.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from _measure import at_most, judged, keep, machine, recorded, seconds, versions_of

from align.similarity.floors.exchange import FLOOR_ROWS, PERMUTATIONS, Sampled, floors
from align.similarity.measures.base import Measure, resampling
from align.similarity.measures.by_name import parse_measures

#: Floors over measure, at most.
WANTED = 4.0
DOCUMENTS = 64


def sampled(n: int, layers: int, width: int) -> tuple[list[Any], list[Any], Sampled]:
    """Two models' layers that share a core, and where their rows come from."""
    rng = np.random.default_rng(0)
    document, place = np.divmod(np.arange(n), n // DOCUMENTS)
    token = np.minimum(rng.zipf(1.3, n), 5000)
    core = rng.standard_normal((n, width), dtype=np.float32) * np.arange(1, width + 1, dtype=np.float32) ** -0.5
    sides: list[list[Any]] = [[], []]
    for side in sides:
        for _ in range(layers):
            turn = rng.standard_normal((width, width), dtype=np.float32) / np.float32(np.sqrt(width))
            side.append(core @ turn + 0.05 * rng.standard_normal((n, width), dtype=np.float32))
    return sides[0], sides[1], Sampled(document, place, token)


def cost(measure: Measure, n: int, layers: int, width: int, draws: int) -> dict[str, float]:
    """Seconds of a measure and of its floors."""
    xs, ys, rows = sampled(n, layers, width)
    both = [*xs, *ys]
    wanted = [(i, j) for i in range(len(both)) for j in range(len(both)) if i <= j or not measure.symmetric]
    drawn = resampling(rows.document, draws=1000)
    own = seconds(lambda: measure(both, wanted, drawn, lambda _: None))
    spent = seconds(lambda: floors(measure, xs, ys, rows, draws=draws, most=n))
    return {"rows": n, "layers": layers, "measure": own, "floors": spent, "ratio": spent / own}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--permutations", type=int, default=PERMUTATIONS)
    parser.add_argument("--measures", default="all")
    parser.add_argument("--keep", action="store_true", help="Write benchmarks/results/bench_floors.json.")
    arguments = parser.parse_args()
    found = {}
    for measure in parse_measures(arguments.measures):
        slow = measure.floor_rows < FLOOR_ROWS
        n, layers = (measure.floor_rows, min(2, arguments.layers)) if slow else (arguments.rows, arguments.layers)
        one = found[measure.name] = cost(measure, n, layers, arguments.width, arguments.permutations)
        print(
            f"{measure.name:20} {n:6} rows, {layers} x {layers} layers: measure {one['measure']:7.1f} s, floors "
            f"{one['floors']:7.1f} s, ratio {one['ratio']:6.2f}",
            flush=True,
        )
    goals = recorded({"floors of CKA over CKA": at_most(WANTED, found["cka"]["ratio"])} if "cka" in found else {})
    if goals:
        print(judged(goals))
    if arguments.keep:
        about = {"width": arguments.width, "permutations": arguments.permutations, "documents": DOCUMENTS}
        keep(
            "bench_floors",
            {
                **about,
                "measures": found,
                "goals": goals,
                "machine": machine(),
                "versions": versions_of("numpy"),
            },
        )


if __name__ == "__main__":
    main()
