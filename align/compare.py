"""A leaderboard of runs beside their closed-form optima and controls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from featstore.errors import AdapterError
from featstore.provenance import read_json

_FIGURES = ("r2", "r2_median_dim", "cosine_centered", "retrieval_top1", "retrieval_chance", "cka_debiased", "n")


def compare_runs(directories: Sequence[Path]) -> dict[str, Any]:
    """Collect the test figures of several runs, best R2 first within each layer pair.

    Args:
        directories: Run directories.

    Returns:
        ``{"rows": [{"run", "type", "pair", "trainable", "r2", ..., "baselines": {...}, "warnings": [...]}]}``.

    Raises:
        AdapterError: A directory holds no run, or a damaged one.
    """
    rows: list[dict[str, Any]] = []
    for directory in directories:
        path = directory / "metrics.json"
        if not path.is_file() or not (directory / "adapter.json").is_file():
            raise AdapterError(f"no finished run in {str(directory)!r}; make one with `align train`")
        metrics, card = read_json(path), read_json(directory / "adapter.json")
        try:
            rows += _rows(directory, metrics, card)
        except (LookupError, TypeError, AttributeError) as error:
            raise AdapterError(f"the run in {str(directory)!r} is damaged ({error!r}); train it again") from error
    rows.sort(key=lambda row: (row["pair"], -(row["r2"] if row["r2"] is not None else -1e9)))
    return {"rows": rows}


def _rows(directory: Path, metrics: dict[str, Any], card: dict[str, Any]) -> list[dict[str, Any]]:
    trainable = {entry["key"]: entry["parameters"]["trainable"] for entry in card["pairs"]}
    return [
        {
            "run": str(directory),
            "type": metrics["type"],
            "pair": key,
            "trainable": trainable.get(key),
            **{name: entry["test"].get(name) for name in _FIGURES},
            "baselines": {
                name: None if figures is None else figures.get("r2") for name, figures in entry["baselines"].items()
            },
            "warnings": [warning["code"] for warning in entry["warnings"]],
        }
        for key, entry in metrics["pairs"].items()
    ]


def describe(result: dict[str, Any]) -> str:
    """The leaderboard as lines for people.

    Args:
        result: From :func:`compare_runs`.
    """
    head = f"{'pair':28} {'type':13} {'trained':>9} {'R2':>7} {'median':>7} {'top-1':>6}  controls' R2; closed form"
    lines = [head]
    for row in result["rows"]:
        controls = ", ".join(f"{name} {value:.2f}" for name, value in row["baselines"].items() if value is not None)
        values = " ".join(
            f"{row[name]:{width}.3f}" if row[name] is not None else f"{'-':>{width}}"
            for name, width in (("r2", 7), ("r2_median_dim", 7), ("retrieval_top1", 6))
        )
        marks = f"  [{', '.join(row['warnings'])}]" if row["warnings"] else ""
        lines.append(f"{row['pair']:28} {row['type']:13} {row['trainable'] or 0:9} {values}  {controls}{marks}")
    return "\n".join(lines)
