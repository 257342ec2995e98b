"""Closed forms of one sweep beside the former build's commands, at the width of the models they are for.

    OMP_NUM_THREADS=2 python benchmarks/bench_sweep.py --width 4096 --rounds 5

A synthetic store of two models, planted by each build in its own format from the same rows. In every round both builds
make procrustes, affine and reduced-rank of one layer pair with all controls: the former build by three `align train`,
this one by three `align train` and by one `align sweep`. Wanted: the sweep takes at most 0.30 of the three commands,
each type alone at most 0.5 of its own, and no more than half their memory. Then the same for several layer pairs, of
which a sweep may take 0.25. Rounds are interleaved, and ratios are medians of the ratios within a round, by the clock
and by CPU seconds; where other work runs beside, the latter are the ones to look at.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from _former import FORMER, REPOSITORY, Spent, former_build, run_build
from _measure import Goal, at_most, judged, keep, machine, recorded, versions_of

TYPES = ("procrustes", "affine", "reduced-rank")
#: Largest share of the former build's time, and of its memory, that is wanted.
SWEEP, ALONE, SEVERAL, MEMORY = 0.30, 0.50, 0.25, 0.50
#: Rows for every dimension, as of the 21.7 k pairs of a store of width 4096.
ROWS_PER_DIMENSION = 5.3


def rows_of(width: int, rows: int, layers: int) -> tuple[np.ndarray, list[dict[int, np.ndarray]]]:
    """Tokens by Zipf's law, and states of two models that share a core and hold their token; layer 0 is the token."""
    rng = np.random.default_rng(0)
    vocabulary = max(64, rows // 6)
    chance = 1 / np.arange(1, vocabulary + 1)
    tokens = rng.choice(vocabulary, rows, p=chance / chance.sum())
    core = rng.standard_normal((rows, width), np.float32) * np.arange(1, width + 1, dtype=np.float32) ** -0.5
    sides = []
    for _ in range(2):
        zero = 0.3 * rng.standard_normal((vocabulary, width), np.float32)[tokens]
        side = {0: zero}
        for layer in range(1, layers + 1):
            turn = rng.standard_normal((width, width), np.float32) / np.float32(np.sqrt(width))
            side[layer] = core @ turn + 0.5 * zero + 0.1 * rng.standard_normal((rows, width), np.float32) + 0.3
        sides.append(side)
    return tokens, sides


def plant_here(path: Path, width: int, rows: int, layers: int) -> None:
    """Plant with the build that this process imports."""
    tokens, sides = rows_of(width, rows, layers)
    try:
        from tests.support.planted import plant

        plant(path, *sides, form="bfloat16", documents=60, tokens=tokens)
    except ImportError:
        # The former build, whose stores name no tokens of one's own.
        from tests.planted import plant as plant_former  # type: ignore[import-untyped]

        plant_former(path, *sides, form="bfloat16", documents=60)


def contenders(stores: dict[str, Path], builds: dict[str, Path], layers: str, *, alone: bool) -> dict[str, Any]:
    """By name what a contender runs: the build and the words of its command, but for ``--out``."""
    found = {}
    for build in ("former", "ours"):
        for name in TYPES if build == "former" or alone else ():
            words = ["train", "--store", str(stores[build]), "--type", name, "--layers", layers]
            found[f"{build} {name}"] = builds[build], words
    words = ["sweep", "--store", str(stores["ours"]), "--types", ",".join(TYPES), "--layers", layers]
    found["ours sweep"] = builds["ours"], words
    return found


def measure(named: dict[str, Any], rounds: int, directory: Path) -> dict[str, list[Spent]]:
    """What every contender took in every round, one process at a time, in an order that differs by round."""
    order = np.random.default_rng(0)
    taken: dict[str, list[Spent]] = {name: [] for name in named}
    for turn in range(rounds):
        for name in order.permutation(sorted(named)).tolist():
            build, words = named[name]
            with tempfile.TemporaryDirectory(dir=directory) as out:
                taken[name].append(run_build(build, ["-m", "align", *words, "--out", str(Path(out) / "run")]))
            spent = taken[name][-1]
            memory = f"{spent.peak / 2**30:6.2f} GiB"
            print(f"  round {turn + 1} {name:22} {spent.seconds:8.1f} s {spent.cpu:8.1f} CPU s {memory}", flush=True)
    return taken


def ratios_of(taken: dict[str, list[Spent]], ours: str, theirs: list[str]) -> dict[str, float]:
    """Time of one contender over that of others together, and memory over the most that one of them takes."""
    rounds = range(len(taken[ours]))

    def median(value: str, over: Any) -> float:
        return float(
            statistics.median(
                getattr(taken[ours][i], value) / over(getattr(taken[name][i], value) for name in theirs) for i in rounds
            )
        )

    return {"seconds": median("seconds", sum), "cpu": median("cpu", sum), "peak": median("peak", max)}


def summary(taken: dict[str, list[Spent]]) -> dict[str, dict[str, list[float]]]:
    """The figures of every round, to be kept."""
    return {
        name: {value: [getattr(spent, value) for spent in spents] for value in ("seconds", "cpu", "peak")}
        for name, spents in taken.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rows", type=int, help="pairs of the store; 5.3 for every dimension if not given")
    parser.add_argument("--pairs", type=int, default=10, help="layer pairs of the second part; 1 leaves it out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rounds-of-several", type=int, help="of the second part; as many if not given")
    parser.add_argument("--small", action="store_true", help="width 256, three layer pairs, one round: in seconds")
    parser.add_argument("--directory", type=Path, help="where to write; by default a temporary directory")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/bench_sweep.json")
    parser.add_argument("--json", action="store_true", help="print the result as one line")
    parser.add_argument("--plant", type=int, nargs=3, metavar=("WIDTH", "ROWS", "LAYERS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plant:
        plant_here(arguments.directory, *arguments.plant)
        return
    if arguments.small:
        arguments.width, arguments.pairs, arguments.rounds = 256, 3, 1
    width, rounds = arguments.width, arguments.rounds
    rows = arguments.rows or round(ROWS_PER_DIMENSION * width)
    before, builds = machine(), {"former": former_build(), "ours": REPOSITORY}
    result: dict[str, Any] = {
        "device": {**before, "threads": os.environ.get("OMP_NUM_THREADS", "all")},
        "versions": versions_of("featstore", "numpy", "scipy", "threadpoolctl"),
        "former": FORMER,
        "width": width,
        "rows": rows,
    }
    goals: dict[str, Goal] = {}
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        stores = {build: Path(folder) / f"{build}.zarr" for build in builds}
        for build, path in stores.items():
            words = [__file__, "--directory", str(path), "--plant", str(width), str(rows), str(max(arguments.pairs, 1))]
            run_build(builds[build], words)
        print(f"one layer pair of width {width}, {rows} rows", flush=True)
        taken = measure(contenders(stores, builds, "1", alone=True), rounds, Path(folder))
        three = [f"former {name}" for name in TYPES]
        result["one"] = {"figures": summary(taken), "sweep": ratios_of(taken, "ours sweep", three)}
        goals["one sweep over three commands"] = at_most(SWEEP, result["one"]["sweep"]["seconds"])
        goals["memory of the sweep"] = at_most(MEMORY, result["one"]["sweep"]["peak"])
        for name in TYPES:
            result["one"][name] = ratios_of(taken, f"ours {name}", [f"former {name}"])
            goals[f"{name} alone"] = at_most(ALONE, result["one"][name]["seconds"])
            goals[f"memory of {name}"] = at_most(MEMORY, result["one"][name]["peak"])
        if arguments.pairs > 1:
            print(f"{arguments.pairs} layer pairs", flush=True)
            layers = ",".join(str(layer) for layer in range(1, arguments.pairs + 1))
            named = contenders(stores, builds, layers, alone=False)
            taken = measure(named, arguments.rounds_of_several or rounds, Path(folder))
            result["several"] = {
                "pairs": arguments.pairs,
                "figures": summary(taken),
                "sweep": ratios_of(taken, "ours sweep", three),
            }
            goals[f"{arguments.pairs} layer pairs in one sweep"] = at_most(
                SEVERAL, result["several"]["sweep"]["seconds"]
            )
    result["goals"] = recorded(goals)
    print(judged(result["goals"]))
    for part in ("one", "several"):
        for name, ratio in result.get(part, {}).items():
            if isinstance(ratio, dict) and "cpu" in ratio:
                print(f"{part}, {name}: {ratio['cpu']:.2f} by CPU seconds, {ratio['seconds']:.2f} by the clock")
    if arguments.json:
        print(json.dumps(result))
    if arguments.keep:
        print(keep("bench_sweep", result))


if __name__ == "__main__":
    main()
