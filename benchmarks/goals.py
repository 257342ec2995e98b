"""Every goal that has a benchmark, what was measured last, and what limits what fell short: docs/performance.md.

    python benchmarks/goals.py            # print the page
    python benchmarks/goals.py --write    # write docs/performance.md
    python benchmarks/goals.py --check    # fail where it is not what benchmarks keep

Benchmarks keep their goals in `benchmarks/results`; nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _measure import RESULTS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
#: What limits a goal that fell short, by its name.
LIMITS: dict[str, str] = {
    "width 4096, procrustes: share of the former build's time": (
        "two polar factors (the map's and its control's), each for the most part LAPACK's eigendecomposition, are half "
        "of it; no way to a factor that was tried is faster. A scan and scores of rows are the rest."
    ),
    "width 4096, affine: share of the former build's time": (
        "the scan, LAPACK's decomposition and the products around it, and then scoring, with the token's prediction, "
        "which the former build did not have."
    ),
    "width 4096, closed: share of the former build's time": (
        "three eigendecompositions (the source's and two polar factors') are a fifth, products of width cubed around "
        "them as much, and scoring every map and control on rows a quarter, with the token's prediction, which the "
        "former build did not have."
    ),
    "scan and fits of 25 layer pairs over the scan, 5120 rows": (
        "a layer pair costs a decomposition for its rotation and one for every strength of reduced rank that is tried; "
        "below width 1024 nothing tried is faster than LAPACK."
    ),
    "training at width 256: speed over bare steps": (
        "a step takes 2 ms on two cores; picking and widening the rows of the next ones takes a part of one of these."
    ),
    "evaluate generate: share of the former build's peak memory": (
        "one model is held at a time; of the demo pair, whose models are small, imports and the stored run are most of "
        "what is left."
    ),
    "evaluate communicate: speed over the former build": (
        "texts are generated token by token with a model in both builds; what was saved is around them. Measured once."
    ),
    "evaluate communicate: share of the former build's peak memory": (
        "one model is held at a time; of the demo pair, whose models are small, imports and the stored run are most of "
        "what is left."
    ),
    "evaluate stitch: speed over the former build": (
        "passes through the models, which both builds make, are most of the time; what a pass costs is theirs."
    ),
    "evaluate stitch: largest difference of a figure, nats": (
        "the control's random rotation is another draw of the same seed (decision 45); the losses of all other "
        "conditions are equal to the last bit."
    ),
    "reading hot, into a buffer, over memmap, worst round": (
        "the memmap's own rounds lie as far apart: both copy memory, on a machine that shares its own."
    ),
    "reading hot, new memory, over memmap": (
        "new memory is paged in while it is filled, which takes as long as copying, in both, and varies from round to "
        "round."
    ),
    "archive, warm, into a buffer, over memmap": (
        "decompression: what the cores decode is given as a goal of its own."
    ),
}
HEAD = """# Performance

Made by `python benchmarks/goals.py --write` from the results that benchmarks keep. A figure is the median over
interleaved rounds on one machine; the range is that of the rounds. Ratios hold better than seconds from one machine to
another. `./scripts/gpu` measures what needs a GPU.
"""


def kept() -> Iterator[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """Benchmark, goal, its record and the result that holds it, for every goal of every result."""
    for file in sorted(RESULTS.glob("bench_*.json")):
        found = json.loads(file.read_text())
        for result in found if isinstance(found, list) else [found]:
            for part in (result, *(value for value in result.values() if isinstance(value, dict))):
                for name, goal in part.get("goals", {}).items():
                    # Records of earlier builds say less.
                    if isinstance(goal, dict):
                        yield file.stem, name, goal, result


def page() -> str:
    """The page, in Markdown."""
    lines = [HEAD, "| goal | measured | range | wanted | |", "|---|---|---|---|---|"]
    machines, short = {}, []
    for benchmark, name, goal, result in kept():
        spread = f"{goal['low']:.3g} to {goal['high']:.3g}" if goal["rounds"] > 1 else ""
        met = "met" if goal["met"] else "missed"
        lines.append(f"| {name} | {goal['measured']:.3g} | {spread} | at {goal['bound']} {goal['wanted']:g} | {met} |")
        machines[benchmark] = machine_of(result)
        if not goal["met"] and name in LIMITS:
            short.append(f"- {name}: {LIMITS[name]}")
    if short:
        lines += ["", "What limits those that were missed:", "", *short]
    lines += ["", "Where they were measured:", ""]
    lines += [f"- `benchmarks/{script_of(benchmark)}`: {where}" for benchmark, where in machines.items()]
    return "\n".join(lines) + "\n"


def script_of(result: str) -> str:
    """The benchmark that keeps a result, whose name may go on after the benchmark's."""
    here = Path(__file__).parent
    while not (here / f"{result}.py").is_file():
        result = result.rpartition("_")[0]
    return f"{result}.py"


def machine_of(result: dict[str, Any]) -> str:
    """Processor, cores and versions in a line."""
    host = result.get("machine") or result.get("device")
    host = host if isinstance(host, dict) else {}
    about = [result["gpu"]] if "gpu" in result else []
    about += [f"{host['cpu']}, {host['cores']} cores, load {host['load_before']} before"] if "cpu" in host else []
    about += [f"{name} {version}" for name, version in result.get("versions", {}).items()]
    return ", ".join(about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/performance.md instead of printing it")
    parser.add_argument("--check", action="store_true", help="fail where docs/performance.md is not what is kept")
    options = parser.parse_args()
    if options.write:
        PAGE.write_text(page())
    elif options.check:
        if PAGE.read_text() != page():
            raise SystemExit(f"{PAGE} is not what benchmarks keep; run python benchmarks/goals.py --write")
    else:
        print(page(), end="")


if __name__ == "__main__":
    main()
