"""What changed from one run to another: maps of both with their difference, and what only one of them has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.layers import in_order
from align.statistics import Estimate
from align.sweeps.differences import MAP, difference, verdicts
from align.sweeps.entries import CLOSED, Entry, read_entries
from align.sweeps.table import labels_of, with_interval, wrapped
from featstore.runtime.visible import inline

#: What both runs have of a map, beside R2 and its difference.
_FIGURES = ("partial_r2", "val_r2", "retrieval_top1", "cosine_centered", "trainable")


def changes(first: Path, second: Path) -> dict[str, Any]:
    """Compare two runs, layer pair by layer pair.

    Args:
        first: Run directory.
        second: Run directory.

    Returns:
        ``first`` and ``second``, the directories; ``both``, the largest loss of R2 first, each ``{"pair", "types",
        "r2", "r2_ci95", "difference", "ci95", "p", "p_adjusted", "verdict", "figures": {name: [of first, of second]},
        "baselines": {name: [of first, of second]}, "warnings_gone", "warnings_new", "reason"}`` with lists of the first
        run's value and the second's, and the difference of R2 as the second's less the first's, null with a ``reason``
        where the two were not scored on the same rows; ``only_first`` and ``only_second``, each
        ``{"pair", "type", "r2", "r2_ci95"}``; ``tests``: how many differences were judged together (Holm).

    Raises:
        AdapterError: A directory holds no finished run, or a damaged one.
    """
    sides = [{entry.row["pair"]: entry for entry in read_entries(directory)} for directory in (first, second)]
    for entry in (*sides[0].values(), *sides[1].values()):
        entry.interval()
    shared = sorted((pair for pair in sides[0] if pair in sides[1]), key=in_order)
    found = [_change(sides[0][pair], sides[1][pair]) for pair in shared]
    said = verdicts([estimate for _, estimate in found])
    for (block, _), one in zip(found, said, strict=True):
        block |= {"p_adjusted": one.p_adjusted, "verdict": one.verdict}
    both = [block for block, _ in found]
    # What got worse stands first; what cannot be compared, last.
    both.sort(key=lambda block: (block["difference"] is None, block["difference"] or 0.0))
    only = [
        [{name: own[pair].row[name] for name in ("pair", "type", "r2", "r2_ci95")}
         for pair in sorted(own.keys() - other.keys(), key=in_order)]
        for own, other in (sides, sides[::-1])
    ]  # fmt: skip
    return {
        "first": str(first),
        "second": str(second),
        "both": both,
        "only_first": only[0],
        "only_second": only[1],
        "tests": sum(block["p"] is not None for block in both),
    }


def _change(first: Entry, second: Entry) -> tuple[dict[str, Any], Estimate | None]:
    before, after = first.row, second.row
    reason, estimate = None, None
    if first.place != second.place:
        reason = "the two runs were scored on different sets of rows"
    elif before["r2"] is None or after["r2"] is None:
        reason = "R2 is undefined"
    else:
        tested = difference(second.sums, first.sums, MAP, before["run"])
        estimate = tested if isinstance(tested, Estimate) else None
        reason = tested if isinstance(tested, str) else None
    known = first.place == second.place and None not in (before["r2"], after["r2"])
    baselines = dict.fromkeys(name for row in (before, after) for name in row["baselines"] if name != CLOSED)
    return {
        "pair": before["pair"],
        "types": [before["type"], after["type"]],
        "r2": [before["r2"], after["r2"]],
        "r2_ci95": [before["r2_ci95"], after["r2_ci95"]],
        "difference": after["r2"] - before["r2"] if known else None,
        "ci95": None if estimate is None or estimate.interval is None else list(estimate.interval),
        "p": None if estimate is None else estimate.p,
        "figures": {name: [before[name], after[name]] for name in _FIGURES},
        "baselines": {name: [row["baselines"].get(name) for row in (before, after)] for name in baselines},
        "warnings_gone": [code for code in before["warnings"] if code not in after["warnings"]],
        "warnings_new": [code for code in after["warnings"] if code not in before["warnings"]],
        "reason": reason,
    }, estimate


def describe_changes(result: Mapping[str, Any]) -> str:
    """What changed, as lines for people.

    Args:
        result: From :func:`changes`.
    """
    labels = labels_of([result["first"], result["second"]])
    first, second = (inline(labels[result[side]]) for side in ("first", "second"))
    lines = [f"from {first} to {second}: {len(result['both'])} layer pairs in both"]
    for block in result["both"]:
        types = " -> ".join(dict.fromkeys(block["types"]))
        values = [with_interval(value, ends) for value, ends in zip(block["r2"], block["r2_ci95"], strict=True)]
        lines += ["", f"{inline(block['pair'])}, {types}", f"  R2 {values[0]} -> {values[1]}"]
        lines += wrapped(f"difference {_difference(block)}", "  ")
        for name, sign in (("warnings_gone", "no longer warned of"), ("warnings_new", "now warned of")):
            if block[name]:
                lines += wrapped(f"{sign}: {', '.join(block[name])}", "  ")
    for side, name in (("only_first", first), ("only_second", second)):
        if result[side]:
            lines += ["", f"only in {name}:", *(_alone(row) for row in result[side])]
    if result["tests"]:
        text = f"Better and worse are by p values adjusted for all {result['tests']} differences (Holm, 5 %)"
        lines += ["", *wrapped(text, "")]
    return "\n".join(lines)


def _difference(block: Mapping[str, Any]) -> str:
    if block["difference"] is None:
        return f"-: {block['reason']}"
    found = with_interval(block["difference"], block["ci95"], "+")
    if block["p"] is None:
        return f"{found}, no test: {block['reason']}"
    return f"{found}, p {block['p']:.2g}, adjusted {block['p_adjusted']:.2g}: {block['verdict']}"


def _alone(row: Mapping[str, Any]) -> str:
    return f"  {inline(row['pair'])}, {row['type']}, R2 {with_interval(row['r2'], row['r2_ci95'])}"


def verdict_counts(both: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many maps got better, worse, neither, or cannot be told.

    Args:
        both: ``both`` of :func:`changes`.
    """
    said = [block["verdict"] for block in both]
    return {verdict: said.count(verdict) for verdict in dict.fromkeys(said)}
