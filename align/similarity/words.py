"""What `align cka` says on a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

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
    """The main figures as a table, each layer's best partner, the floor, and the other measures in a line each.

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
    floor = _numbers(result["null"]["cross"])
    if floor:
        lines.append(f"floor (shuffled pairs): at most {max(map(abs, floor)):.4f}")
    lines += _measures(result)
    lines += [f"undefined: {where}: {why}" for where, why in result["reasons"].items()]
    return "\n".join(lines)


def _measures(result: Mapping[str, Any]) -> list[str]:
    if not result.get("measures"):
        return []
    sample = result["sample"]
    lines = [
        f"over {sample['rows']} of {sample['of']} pairs from {sample['documents']} documents, closest pair of layers:",
        f"  {'':20} {'':>23} {'value':>8}  {'95 % interval':18} {'shuffled':>8} {'noise':>8} {'rounding':>8}",
    ]
    for name, block in result["measures"].items():
        values = np.array(block["cross"], dtype=float)
        if not np.isfinite(values).any():
            why = next(iter(block["reasons"].values()), "undefined")
            lines.append(f"  {name:20} undefined: {why}")
            continue
        i, j = _closest(values, block["closer"], alone=result["models"][0] == result["models"][1])
        (a, b), layers = result["models"], result["layers"]
        interval = block["ci95"]["cross"][i][j]
        between = "-" if interval is None else f"{interval[0]:.4f} .. {interval[1]:.4f}"
        floors = [block["floors"][kind]["cross"][i][j] for kind in ("shuffled", "noise")]
        ceiling = block["ceilings"]["rounding"][a][i]
        others = " ".join(f"{'-':>8}" if v is None else f"{v:8.4f}" for v in (*floors, ceiling))
        where = f"{a}:{layers[a][i]} {b}:{layers[b][j]}"
        lines.append(f"  {name:20} {where:>23} {values[i, j]:8.4f}  {between:18} {others}")
        if len(block["reasons"]):
            lines.append(f"  {'':20} {len(block['reasons'])} pairs of layers undefined, see cka.json")
    return lines


def _closest(values: np.ndarray[Any, Any], closer: str, *, alone: bool) -> tuple[int, int]:
    ranked = values if closer == "higher" else -values
    if alone and len(values) > 1:
        # A layer is closest to itself.
        ranked = np.where(np.eye(len(values), dtype=bool), math.nan, ranked)
    if not np.isfinite(ranked).any():
        ranked = values
    i, j = np.unravel_index(np.nanargmax(ranked), ranked.shape)
    return int(i), int(j)


def _numbers(table: Sequence[Sequence[float | None]]) -> list[float]:
    return [v for row in table for v in row if v is not None]
