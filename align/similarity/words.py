"""What `align cka` says on a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from align.judging.sentences import described
from align.similarity.floors.reading import readings
from align.statistics import SIGNIFICANT
from featstore.text.roles import of_roles


def best_partners(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """For every layer of the first model the most similar layer of the second.

    Args:
        result: From :meth:`Comparison.run`.
    """
    first, second = result["models"]
    table = {}
    for layer, row in zip(result["layers"][first], np.asarray(result["cross"], dtype=float), strict=True):
        if np.isfinite(row).any():
            best = int(np.nanargmax(row))
            table[str(layer)] = {"layer": result["layers"][second][best], "cka": float(row[best])}
    return table


def describe(result: Mapping[str, Any]) -> str:
    """The main figures as a table, each layer's best partner, the floors, and the other measures in a line each.

    Args:
        result: Contents of ``cka.json``.
    """
    first, second = result["models"]
    title = "CKA" if result["kernel"] == "linear" else "RBF CKA"
    over = f"over {result['n']} pairs{of_roles(result.get('roles'))}, {result['masked_rows']} attention sinks apart"
    lines = [f"{result['estimator']} {title} {over}"]
    lines.append(f"{first:>10} | " + " ".join(f"{second}:{k}".rjust(12) for k in result["layers"][second]))
    for layer, row in zip(result["layers"][first], result["cross"], strict=True):
        lines.append(f"{layer:10} | " + " ".join(f"{v:12.4f}" if v is not None else f"{'-':>12}" for v in row))
    for layer, best in best_partners(result).items():
        lines.append(f"{first}:{layer} is most like {second}:{best['layer']} ({best['cka']:.4f})")
    lines += floor_lines(result)
    lines += _measures(result)
    lines += [f"undefined: {where}: {why}" for where, why in result["reasons"].items()]
    lines += [described(found) for found in result.get("warnings", ())]
    return "\n".join(lines)


def floor_lines(result: Mapping[str, Any]) -> list[str]:
    """The intervals of the main figure and its floors, a line each.

    Args:
        result: Contents of ``cka.json``.
    """
    alone = result["models"][0] == result["models"][-1]
    lines = _reach(result.get("ci95") or {}, alone=alone)
    if "permutations" in result and not result["permutations"]:
        what = "what tokens, positions and documents in common give is not known"
        lines.append(f"no floors: {what}; --permutations 39 says it")
    for floor in readings(result.get("permutations") or {}, alone=alone):
        if floor.reason is not None:
            lines.append(f"no floor, {floor.name}: {floor.reason}")
            continue
        rows = f"{floor.draws} exchanges of {floor.rows} rows, {floor.documents} documents"
        said = f"floor, {floor.name}: {floor.low:.4f} to {floor.high:.4f}, 95 % below {floor.edge:.4f}; "
        above = (
            f"{floor.above} of {floor.pairs} pairs of layers are above it (p <= {SIGNIFICANT} over all of them; {rows})"
        )
        lines.append(said + (above if floor.is_decided else f"nothing is decided ({rows})"))
    return lines


def _reach(intervals: Mapping[str, Any], *, alone: bool) -> list[str]:
    """How far the intervals of the main figure reach, in a line."""
    if intervals.get("reason"):
        return [f"no 95 % intervals: {intervals['reason']}"]
    halves = [
        (ends[1] - ends[0]) / 2
        for i, row in enumerate(intervals.get("cross") or ())
        for j, ends in enumerate(row)
        if ends is not None and not (alone and j <= i)
    ]
    if not halves:
        return []
    over = f"jackknife over {intervals['documents']} documents of {intervals['rows']} of {intervals['of']} pairs"
    return [f"95 % intervals: \u00b1 {min(halves):.4f} to {max(halves):.4f} ({over})"]


def _measures(result: Mapping[str, Any]) -> list[str]:
    if not result.get("measures"):
        return []
    sample = result["sample"]
    lines = [
        f"over {sample['rows']} of {sample['of']} pairs from {sample['documents']} documents, closest pair of layers:",
        "  {:20} {:>23} {:>8}  {:18} {:>25} {:>25} {:>8} {:>8}".format(
            "", "", "value", "95 % interval", "documents", "token", "noise", "rounding"
        ),
    ]
    for name, block in result["measures"].items():
        values = np.array(block["cross"], dtype=float)
        if not np.isfinite(values).any():
            why = next(iter(block["reasons"].values()), "undefined")
            lines.append(f"  {name:20} undefined: {why}")
            continue
        i, j = _closest(values, block["closer"], alone=result["models"][0] == result["models"][1])
        (a, b), layers = result["models"], result["layers"]
        between = _interval(block, i, j)
        exchanged = " ".join(f"{_exchanged(block, kind, i, j):>25}" for kind in ("documents", "token"))
        controls = block["floors"]["noise"]["cross"][i][j], block["ceilings"]["rounding"][a][i]
        others = exchanged + " " + " ".join(f"{'-':>8}" if v is None else f"{v:8.4f}" for v in controls)
        where = f"{a}:{layers[a][i]} {b}:{layers[b][j]}"
        lines.append(f"  {name:20} {where:>23} {values[i, j]:8.4f}  {between:18} {others}")
        if len(block["reasons"]):
            lines.append(f"  {'':20} {len(block['reasons'])} pairs of layers undefined, see cka.json")
    if any(block.get("permutations") for block in result["measures"].values()):
        lines.append(
            "  documents and token: the value over the floor's own rows / mean of the exchanges (p over all pairs)"
        )
    if any(_documents(block).get("excess_ci95") for block in result["measures"].values()):
        lines.append("  intervals with a sign are those of the value less its floor with documents exchanged")
    return lines


def _documents(block: Mapping[str, Any]) -> Mapping[str, Any]:
    return (block.get("permutations") or {}).get("documents") or {}


def _interval(block: Mapping[str, Any], i: int, j: int) -> str:
    """The interval of a value; of a biased measure, with signs, that of the value less its floor."""
    interval, sign = block["ci95"]["cross"][i][j], ""
    if interval is None:
        excess = _documents(block).get("excess_ci95")
        interval, sign = (excess[i][j] if excess else None), "+"
    return "-" if interval is None else f"{interval[0]:{sign}.4f} .. {interval[1]:{sign}.4f}"


def _exchanged(block: Mapping[str, Any], kind: str, i: int, j: int) -> str:
    """A measure over the rows of its floor at a pair of layers, the floor's mean there, and the p value.

    The value over the whole sample is of other rows, and may lie below a floor that the value here is above.
    """
    floor = (block.get("permutations") or {}).get(kind) or {}
    value, mean, p = (floor[table][i][j] if floor.get(table) else None for table in ("value", "mean", "p_max"))
    return "-" if value is None or mean is None or p is None else f"{value:.3f} / {mean:.3f} (p {p:.3f})"


def _closest(values: np.ndarray[Any, Any], closer: str, *, alone: bool) -> tuple[int, int]:
    ranked = values if closer == "higher" else -values
    if alone and len(values) > 1:
        # A layer is closest to itself.
        ranked = np.where(np.eye(len(values), dtype=bool), math.nan, ranked)
    if not np.isfinite(ranked).any():
        ranked = values
    i, j = np.unravel_index(np.nanargmax(ranked), ranked.shape)
    return int(i), int(j)
