"""A leaderboard of runs: each beside its closed-form optimum, its baselines, and a reference that was named beforehand.

Nothing is chosen by test figures. Rows stand in the order of their validation R2, which is what a run is chosen by; the
reference is the run that was named first, or what the user names; and what is called better is judged over the whole
table (:mod:`align.sweeps.differences`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.layers import in_order
from align.statistics import Estimate
from align.sweeps.differences import MAP, difference, verdicts
from align.sweeps.entries import CLOSED, Entry, read_entries
from featstore.errors import SpecError


@dataclass(frozen=True)
class Reference:
    """What the runs are compared with.

    Attributes:
        run: A run directory; None for a baseline.
        baseline: A baseline of every run; None for a run.
        named: Whether the user named it; else it is the run given first that has the layer pair.
    """

    run: str | None
    baseline: str | None
    named: bool

    def block(self) -> dict[str, Any]:
        """As a JSON value."""
        return {"run": self.run, "baseline": self.baseline, "named": self.named}


def compare_runs(directories: Sequence[Path], reference: str | None = None) -> dict[str, Any]:
    """Collect the test figures of several runs, highest validation R2 first within each layer pair and set of rows.

    Layer pairs stand in the order of their models and layer numbers.

    Args:
        directories: Run directories.
        reference: One of them, or a baseline such as ``token``; None for the first that has the layer pair.

    Returns:
        ``rows``, each ``{"run", "type", "pair", "store", "set", "trainable", "shipped", "partial_r2", "r2", "r2_ci95",
        "val_r2", ..., "closed_form": {"name", "r2"}, "baselines": {name: r2}, "versus_reference": {"run", "baseline",
        "difference", "ci95", "p", "p_adjusted", "verdict"}, "versus_closed_form": {...}, "warnings": [code], "reasons":
        {...}}``; ``reference``: ``{"run", "baseline", "named"}``; ``tests``: how many differences were judged together;
        ``chosen``: by layer pair and set the run with the highest validation R2; ``sets``: what decides which rows were
        scored, figures of different sets are not compared; ``rate_distortion``: that of compressed runs, fewest bytes
        first.

    Raises:
        AdapterError: A directory holds no run, or a damaged one.
        SpecError: The reference is neither one of the runs nor one of their baselines.
    """
    entries = [entry for directory in directories for entry in read_entries(directory)]
    chosen = _reference(reference, directories, entries)
    places: dict[str, dict[str, Any]] = {}
    numbers: dict[str, int] = {}
    for entry in entries:
        place = json.dumps(entry.place, sort_keys=True, default=str)
        places.setdefault(place, entry.place)
        entry.row["set"] = numbers.setdefault(place, len(numbers) + 1)
        entry.interval()
    tests = _compare(entries, chosen)
    # Stable: what has no validation R2 stands last, in the order in which the runs were given.
    entries.sort(key=lambda entry: (in_order(entry.row["pair"]), entry.row["set"], -_high(entry.row["val_r2"])))
    rates = [e.rate for e in entries if e.rate is not None]
    return {
        "rows": [entry.row for entry in entries],
        "reference": chosen.block(),
        "tests": tests,
        "chosen": _chosen(entries),
        "sets": [{"set": number, **place} for number, place in enumerate(places.values(), 1)],
        "rate_distortion": sorted(rates, key=lambda rate: rate.get("bytes_per_window") or math.inf),
    }


def _high(r2: float | None) -> float:
    return -math.inf if r2 is None else r2


def _reference(given: str | None, directories: Sequence[Path], entries: Sequence[Entry]) -> Reference:
    if given is None:
        return Reference(str(directories[0]) if directories else None, None, named=False)
    for directory in directories:
        if Path(given).resolve() == directory.resolve():
            return Reference(str(directory), None, named=True)
    baselines = dict.fromkeys(name for entry in entries for name in entry.row["baselines"])
    if given in baselines:
        return Reference(None, given, named=True)
    raise SpecError(
        f"--reference {given!r} is neither among the runs nor a baseline of theirs; name one of the run directories, "
        f"or one of {', '.join(sorted(baselines))}"
    )


def _chosen(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The choice that validation makes wherever there is one; entries come sorted by it."""
    blocks: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for entry in entries:
        blocks.setdefault((entry.row["pair"], entry.row["set"]), []).append(entry.row)
    return [
        {"pair": pair, "set": number, **{name: rows[0][name] for name in ("run", "val_r2", "r2", "r2_ci95")}}
        for (pair, number), rows in blocks.items()
        if len(rows) > 1 and rows[0]["val_r2"] is not None
    ]


def _compare(entries: Sequence[Entry], reference: Reference) -> int:
    """Fill in the differences of every row, judged together, and count them."""
    found: list[tuple[dict[str, Any], Estimate | None]] = []
    references = _references(entries, reference)
    for entry in entries:
        row = entry.row
        row["versus_reference"] = row["versus_closed_form"] = None
        other = _other(entry, references, reference)
        if isinstance(other, str):
            row["reasons"]["versus_reference"] = other
        elif other is not None:
            name = reference.baseline or MAP
            run = None if reference.baseline else other.row["run"]
            row["versus_reference"] = {"run": run, "baseline": reference.baseline}
            found.append(_minus(entry, other, name, "versus_reference"))
        if row[CLOSED] is not None and reference.baseline != CLOSED:
            row["versus_closed_form"] = {}
            found.append(_minus(entry, entry, CLOSED, "versus_closed_form"))
    for (block, _), said in zip(found, verdicts([estimate for _, estimate in found]), strict=True):
        block |= {"p_adjusted": said.p_adjusted, "verdict": said.verdict}
    return sum(block["p"] is not None for block, _ in found)


def _references(entries: Sequence[Entry], reference: Reference) -> dict[tuple[str, int | None], Entry]:
    """The row that others are compared with: of each layer pair, and of each set where no run was named."""
    found: dict[tuple[str, int | None], Entry] = {}
    for entry in entries:
        row = entry.row
        if not reference.named:
            found.setdefault((row["pair"], row["set"]), entry)
        elif row["run"] == reference.run:
            found.setdefault((row["pair"], None), entry)
    return found


def _other(
    entry: Entry, references: Mapping[tuple[str, int | None], Entry], reference: Reference
) -> Entry | str | None:
    """What a row is compared with, or why there is nothing; None for the reference itself."""
    row = entry.row
    if reference.baseline is not None:
        known = row["baselines"].get(reference.baseline) is not None
        return entry if known else f"the run has no baseline {reference.baseline!r}"
    if not reference.named:
        first = references[row["pair"], row["set"]]
        return None if first is entry else first
    named = references.get((row["pair"], None))
    if named is entry:
        return None
    if named is None:
        return f"the reference has no layer pair {row['pair']}"
    return named if named.row["set"] == row["set"] else "the reference was scored on another set of rows"


def _minus(entry: Entry, other: Entry, name: str, where: str) -> tuple[dict[str, Any], Estimate | None]:
    """Fill in the difference to a map of another's, and why it has no interval."""
    row = entry.row
    theirs = other.row["r2"] if name == MAP else other.row["baselines"].get(name)
    known = row["r2"] is not None and theirs is not None
    found = difference(entry.sums, other.sums, name, other.row["run"]) if known else "R2 is undefined"
    estimate = found if isinstance(found, Estimate) else None
    if isinstance(found, str):
        row["reasons"][f"{where}.ci95"] = found
    block: dict[str, Any] = row[where]
    block |= {
        "difference": row["r2"] - theirs if known else None,
        "ci95": None if estimate is None or estimate.interval is None else list(estimate.interval),
        "p": None if estimate is None else estimate.p,
    }
    return block, estimate
