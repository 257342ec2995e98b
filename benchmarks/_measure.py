"""What the benchmarks share: interleaved repetitions, the machine, the page cache, tables, result files.

Run a benchmark alone on its machine. Every contender runs once in every round, in a fresh random order, so that a slow
minute hits all of them; figures are medians over the rounds, and ratios are medians of the ratios within a round.
"""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    runs: int,
    *,
    before: Callable[[str], None] | None = None,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Seconds of every contender in every round.

    Args:
        contenders: What to time, by name.
        runs: Rounds that count.
        before: Called with the contender's name ahead of each timed call, outside of its time.
        warm_up: Whether a round that does not count goes first.
    """
    order, taken = random.Random(0), {name: [] for name in contenders}
    for run in range(-warm_up, runs):
        for name in order.sample(sorted(contenders), len(contenders)):
            gc.collect()
            if before is not None:
                before(name)
            spent = seconds(contenders[name])
            if run >= 0:
                taken[name].append(spent)
    return taken


def by_round(taken: Mapping[str, list[float]], reference: str) -> dict[str, list[float]]:
    """Speed of every contender over that of the reference, round by round."""
    return {
        name: [theirs / mine for theirs, mine in zip(taken[reference], values, strict=True)]
        for name, values in taken.items()
    }


def ratios(taken: Mapping[str, list[float]], reference: str) -> dict[str, float]:
    """Speed of every contender over that of the reference: the median of the ratios within a round."""
    return {name: statistics.median(rounds) for name, rounds in by_round(taken, reference).items()}


def figures(taken: Mapping[str, list[float]], reference: str, amount: float) -> dict[str, dict[str, Any]]:
    """Median rate, its spread and the ratio to the reference, its median and every round's, by contender.

    Args:
        taken: Seconds, by contender.
        reference: Contender that gets 1.0.
        amount: What one call works through, in the unit that the rate shall have.
    """
    to_reference = by_round(taken, reference)
    return {
        name: {
            "rate": amount / statistics.median(values),
            "slowest": amount / max(values),
            "fastest": amount / min(values),
            "ratio": statistics.median(to_reference[name]),
            "rounds": to_reference[name],
        }
        for name, values in taken.items()
    }


# The page cache -----------------------------------------------------------------------------------------------------


def files_under(path: Path) -> list[Path]:
    """A file, or all files of a directory."""
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def drop_from_cache(path: Path) -> float:
    """Write a file or tree to disk and ask the kernel to forget its pages; needs no root.

    Pages that somebody still maps stay, so readers have to be closed before.

    Returns:
        The share of it that is still cached, as `mincore` counts; a cold figure is one only where this is near 0.
    """
    for file in files_under(path):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    return cached_share(path)


def cached_share(path: Path) -> float:
    """Share of a file's or tree's pages that is in memory."""
    cached = total = 0
    libc = ctypes.CDLL(None, use_errno=True)
    for file in files_under(path):
        if not file.stat().st_size:
            continue
        mapped = np.memmap(file, np.uint8, "r")
        present = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
        address, length, vector = mapped.ctypes.data, len(mapped), present.ctypes.data
        if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_void_p(vector)):
            raise OSError(ctypes.get_errno(), f"mincore of {file}")
        cached += int((present & 1).sum())
        total += len(present)
    return cached / total if total else 0.0


# What is printed and kept -------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Processor, cores and memory."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line.partition(":") for line in info.read_text().splitlines()]
        model = next((value.strip() for key, _, value in lines if key.startswith("model name")), model)
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def versions_of(*names: str) -> dict[str, str]:
    """Installed versions; what is missing is left out."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def table(title: str, rows: Mapping[str, Mapping[str, Any]], unit: str) -> str:
    """Lines for people: one contender each, the fastest first."""
    lines = [title, f"  {'':32} {unit:>10} {'ratio':>8}   (slowest .. fastest)"]
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["ratio"]):
        spread = f"({row['slowest']:.4g} .. {row['fastest']:.4g})"
        lines.append(f"  {name:32} {row['rate']:10.4g} {row['ratio']:8.3f}   {spread}")
    return "\n".join(lines)


@dataclass(frozen=True)
class Goal:
    """What was wanted and what was measured.

    Attributes:
        wanted: The bound.
        rounds: What every round measured; the median counts.
        most: Whether the bound is the most it may be, not the least.
    """

    wanted: float
    rounds: tuple[float, ...]
    most: bool

    @property
    def measured(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.rounds)

    @property
    def met(self) -> bool:
        """Whether the median is within the bound."""
        return self.measured <= self.wanted if self.most else self.measured >= self.wanted


def at_least(wanted: float, *rounds: float) -> Goal:
    """A goal that more is better for."""
    return Goal(wanted, rounds, most=False)


def at_most(wanted: float, *rounds: float) -> Goal:
    """A goal that less is better for."""
    return Goal(wanted, rounds, most=True)


def recorded(goals: Mapping[str, Goal]) -> dict[str, dict[str, Any]]:
    """What a result file holds of them, by name; :mod:`goals` makes a table of all of them."""
    return {
        name: {
            "wanted": goal.wanted, "bound": "most" if goal.most else "least", "measured": goal.measured,
            "low": min(goal.rounds), "high": max(goal.rounds), "rounds": len(goal.rounds), "met": goal.met,
        }
        for name, goal in goals.items()
    }  # fmt: skip


def judged(goals: Mapping[str, Mapping[str, Any]]) -> str:
    """Goals and what was measured, from :func:`recorded`, as lines for people."""
    lines = ["goals"]
    for name, goal in goals.items():
        spread = f" ({goal['low']:.4g} .. {goal['high']:.4g})" if goal["rounds"] > 1 else ""
        met = "met   " if goal["met"] else "MISSED"
        lines.append(f"  {met} {name}: {goal['measured']:.4g}{spread}, wanted at {goal['bound']} {goal['wanted']:g}")
    return "\n".join(lines)


def keep(name: str, result: Mapping[str, Any] | list[Any], directory: Path = RESULTS) -> Path:
    """Write a result beside the benchmarks."""
    directory.mkdir(exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
