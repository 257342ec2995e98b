"""Every goal that has a benchmark, what was measured last, and what limits what fell short: docs/performance.md.

    python benchmarks/goals.py            # print the page
    python benchmarks/goals.py --write    # write docs/performance.md

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
LIMITS: dict[str, str] = {}
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
    lines += [f"- `benchmarks/{benchmark}.py`: {where}" for benchmark, where in machines.items()]
    return "\n".join(lines) + "\n"


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
    if parser.parse_args().write:
        PAGE.write_text(page())
    else:
        print(page(), end="")


if __name__ == "__main__":
    main()
