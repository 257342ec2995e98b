"""How often intervals over documents hold the truth, and how often a claim is made where nothing is: before and after.

    python benchmarks/bench_intervals.py [--repetitions 2000]

Everything is drawn from documents whose true figures are known (`tests/support/simulated_documents.py`) and judged with
the product's own functions. *Before* is what the project did first: the percentile bootstrap over documents, "better"
where an interval of a difference to the highest of the table leaves out zero, "held" where an interval meets a claimed
range, and an accuracy "above" where the bootstrap's interval is above zero.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from _measure import keep, versions_of
from numpy.typing import NDArray

from align.metrics import paired_difference, r2_of
from align.statistics import SUPPORTED, holm, judge, paired_proportions, quotient
from tests.support.simulated_documents import LENGTHS, Documents, documents

Array = NDArray[np.float64]
COUNTS = (3, 4, 6, 10, 30, 100)


def bootstrap(columns: Array, statistic: Callable[[Array], Array], rng: np.random.Generator) -> tuple[float, float]:
    """The former interval: 2.5 % and 97.5 % quantiles over 500 resamples of documents.

    Args:
        columns: float64 ``(documents, k)`` sums.
        statistic: Of totals ``(draws, k)``.
        rng: Source of randomness.
    """
    n = len(columns)
    totals = rng.multinomial(n, np.full(n, 1 / n), size=500) @ columns
    with np.errstate(divide="ignore", invalid="ignore"):
        values = statistic(totals)
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)


def r2_before(drawn: Documents, at: int, rng: np.random.Generator) -> tuple[float, float]:
    """The former interval of one map's R2."""
    return bootstrap(np.stack([drawn.sse[at], drawn.sst], axis=1), lambda t: 1 - t[:, 0] / t[:, 1], rng)


def coverage(count: int, lengths: str, repetitions: int) -> dict[str, float]:
    """Shares of intervals that hold the truth, of R2 before and after, of a difference and of a quotient after."""
    rng = np.random.default_rng([count, len(lengths)])
    hits: dict[str, list[bool]] = {"before": [], "R2": [], "difference": [], "quotient": []}
    for _ in range(repetitions):
        drawn = documents(count, rng, truth=(0.5, 0.6), lengths=lengths)
        low, high = r2_before(drawn, 0, rng)
        hits["before"].append(low <= 0.5 <= high)
        first, second = (r2_of(sse, drawn.sst) for sse in drawn.sse)
        for name, found, truth in (
            ("R2", first.estimate(), 0.5),
            ("difference", (second - first).estimate(), 0.1),
            ("quotient", quotient(first, second), 5 / 6),
        ):
            if found.low is not None and found.high is not None:
                hits[name].append(found.low <= truth <= found.high)
    return {name: float(np.mean(held)) for name, held in hits.items()}


def tables(count: int, repetitions: int, *, runs: int = 6, pairs: int = 14) -> dict[str, float]:
    """Shares of leaderboards of equal runs in which some run is called better than another."""
    rng = np.random.default_rng([count, runs])
    before = after = 0
    for _ in range(repetitions):
        claimed, p = False, []
        for _ in range(pairs):
            drawn = documents(count, rng, truth=(0.7,) * runs)
            best = int(np.argmin(drawn.sse.sum(axis=1)))
            for other in range(runs):
                if other != best and not claimed:
                    columns = np.stack([drawn.sse[other], drawn.sse[best], drawn.sst], axis=1)
                    claimed = bootstrap(columns, lambda t: (t[:, 0] - t[:, 1]) / t[:, 2], rng)[0] > 0
            named = (drawn.sse[0], drawn.sst)
            p += [paired_difference((sse, drawn.sst), named).p for sse in drawn.sse[1:]]
        before += claimed
        after += any(value is not None and value <= 0.05 for value in holm(p))
    return {"before": before / repetitions, "after": after / repetitions}


def claims(count: int, repetitions: int) -> dict[str, float]:
    """Shares in which "90 to 95 % of the other map's R2" is upheld of a true 85 %."""
    rng = np.random.default_rng([count, 85])
    before = after = 0
    for _ in range(repetitions):
        drawn = documents(count, rng, truth=(0.34, 0.40), shared=0.2)
        columns = np.stack([drawn.sse[0], drawn.sse[1], drawn.sst], axis=1)
        low, high = bootstrap(columns, lambda t: (t[:, 2] - t[:, 0]) / (t[:, 2] - t[:, 1]), rng)
        before += low <= 0.95 and high >= 0.90
        shares = quotient(*(r2_of(sse, drawn.sst) for sse in drawn.sse))
        after += judge(shares, 0.90, 0.95).state == SUPPORTED
    return {"before": before / repetitions, "after": after / repetitions}


def accuracies(per: int, repetitions: int, *, n: int = 40) -> dict[str, float]:
    """Shares in which one of two equally good answers is called above, questions in clusters of ``per``."""
    rng = np.random.default_rng([per, n])
    before = after = 0
    owner = np.repeat(np.arange(n // per), per)
    for _ in range(repetitions):
        lean = rng.normal(0, 0.25, n // per)[owner]
        first, second = (rng.random(n) < np.clip(0.3 + sign * lean, 0.02, 0.98) for sign in (1, -1))
        columns = np.stack([first.astype(float) - second, np.ones(n)], axis=1)
        before += bootstrap(columns, lambda t: t[:, 0] / t[:, 1], rng)[0] > 0
        after += paired_proportions(first, second, owner).above
    return {"before": before / repetitions, "after": after / repetitions}


def lines(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Rows of one kind as a table for people."""
    cells = [list(rows[0]), *([f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def main() -> None:
    """Print both tables, and keep them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2000)
    repetitions = parser.parse_args().repetitions
    covered = [
        {"lengths": lengths, "documents": count, **coverage(count, lengths, repetitions)}
        for lengths in LENGTHS
        for count in COUNTS
    ]
    print("Coverage of 95 % intervals", *lines(covered), sep="\n")
    few = max(repetitions // 10, 20)
    false = [
        *({"claim": "better, of six equal runs at 14 layer pairs", "n": n, **tables(n, few)} for n in (6, 30)),
        *({"claim": "90 to 95 %, of a true 85 %", "n": n, **claims(n, repetitions)} for n in (6, 30)),
        *({"claim": f"above, 40 questions in clusters of {k}", "n": 40, **accuracies(k, repetitions)} for k in (1, 4)),
    ]
    print("\nClaims where there is nothing", *lines(false), sep="\n")
    result = {"repetitions": repetitions, "tables": few, "coverage": covered, "false_claims": false}
    print(keep("bench_intervals", {**result, "versions": versions_of("numpy", "scipy")}))


if __name__ == "__main__":
    main()
