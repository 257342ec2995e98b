"""The leaderboard as lines for people."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.sweeps.entries import CLOSED
from featstore.runtime.console import human
from featstore.runtime.visible import inline
from featstore.text.roles import of_roles

#: Characters of a line; notes are wrapped, and run names cut, to fit.
_LINE = 140
_BASELINES = {"token": "token", "identity": "identity", "random_rotation": "rotation", "shuffled": "shuffled"}
_HEADS = ("run", "type", "trained", "shipped", "beyond token [95 %]", "R2 [95 %]", "val R2", "optimum")


def describe(result: dict[str, Any]) -> str:
    """The leaderboard as lines for people.

    Args:
        result: From :func:`align.sweeps.compare.compare_runs`.
    """
    rows = result["rows"]
    labels = labels_of([row["run"] for row in rows])
    # A column that nobody has is left out: runs of former versions know no baseline of the token.
    baselines = [name for name in _BASELINES if any(row["baselines"].get(name) is not None for row in rows)]
    columns = [[*_HEADS, *(_BASELINES[name] for name in baselines)]]
    columns += [[*map(inline, (labels[row["run"]], *_cells(row, baselines)))] for row in rows]
    if all(row["partial_r2"] is None for row in rows):
        columns = [[*line[:4], *line[5:]] for line in columns]
    heads, *cells = columns
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    widths[0] = max(min(widths[0], _LINE - 2 - sum(widths[1:]) - len(widths)), 8)
    lines = [_aligned(heads, widths)]
    for (pair, number), block in _blocks(rows).items():
        several = len(result["sets"]) > 1
        lines += ["", f"{inline(pair)}, {block[0]['n']} test rows" + f", set {number}" * several]
        for row in block:
            lines.append(_aligned(cells[rows.index(row)], widths))
            if row["warnings"]:
                lines += _wrapped(f"warnings: {', '.join(row['warnings'])}", "    ")
        for line in _differences(block, labels):
            lines += _wrapped(line, "  ")
        for each in result["chosen"]:
            if (each["pair"], each["set"]) == (pair, number):
                test = _with_interval(each["r2"], each["r2_ci95"], "")
                lines += _wrapped(f"validation chooses {labels[each['run']]}: test R2 {test}", "  ")
    lines += _notes(result, labels)
    return "\n".join(lines)


def _differences(block: Sequence[dict[str, Any]], labels: Mapping[str, str]) -> Iterator[str]:
    for row in block:
        versus = row["versus_reference"]
        if versus is not None:
            other = f"{versus['baseline']} of its own" if versus["baseline"] else labels[versus["run"]]
            yield f"{labels[row['run']]} - {other}: {_said(versus)}"
        if row["versus_closed_form"] is not None:
            yield f"{labels[row['run']]} - its optimum, {row[CLOSED]['name']}: {_said(row['versus_closed_form'])}"


def _said(versus: Mapping[str, Any]) -> str:
    found = f"R2 {_with_interval(versus['difference'], versus['ci95'], '+')}"
    if versus["p"] is None:
        return f"{found}, no test"
    return f"{found}, p {versus['p']:.2g}, adjusted {versus['p_adjusted']:.2g}: {versus['verdict']}"


def _notes(result: dict[str, Any], labels: Mapping[str, str]) -> list[str]:
    lines = [""]
    reference = result["reference"]
    if result["tests"]:
        what = (
            f"baseline {reference['baseline']}"
            if reference["baseline"]
            else f"run {labels.get(reference['run'], reference['run'])}"
        )
        if not reference["named"]:
            what = "run named first that has the layer pair; --reference names another run, or a baseline"
        text = f"reference: the {what}. Better and worse are by p values adjusted for all {result['tests']} differences"
        lines += _wrapped(f"{text} shown here (Holm, 5 %)", "")
    if len(result["sets"]) > 1:
        lines += ["", "Sets are of different rows, so figures of one are not compared with those of another:"]
        for each in result["sets"]:
            stores = sorted({row["store"] or "?" for row in result["rows"] if row["set"] == each["set"]})
            sinks = "kept" if each["keep_sinks"] else f"masked beyond {each['sink_threshold']} x the median norm"
            fingerprint = (each["fingerprint"] or "unknown")[:12]
            pairs = f"pairs {each['pair_policy']}{of_roles(each['roles'])}"
            text = f"set {each['set']}: {', '.join(stores)} ({fingerprint}), {pairs}, sinks {sinks}"
            lines += _wrapped(text, "  ")
    missing: dict[str, list[str]] = {}
    for row in result["rows"]:
        for name, reason in row["reasons"].items():
            if name.endswith("ci95"):
                missing.setdefault(f"no interval: {reason}", []).append(labels[row["run"]])
            elif name == "versus_reference":
                missing.setdefault(f"not compared: {reason}", []).append(labels[row["run"]])
    for reason, runs in missing.items():
        lines += _wrapped(f"{reason} ({', '.join(dict.fromkeys(runs))})", "")
    if result["rate_distortion"]:
        # Only here: without compressed runs nothing of it is needed.
        from align.compress.report import table

        lines += ["", table(result["rate_distortion"])]
    return lines if len(lines) > 1 else []


def _blocks(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    blocks: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        blocks.setdefault((row["pair"], row["set"]), []).append(row)
    return blocks


def labels_of(runs: Sequence[str]) -> dict[str, str]:
    """As much of the end of each path as tells the runs apart.

    Args:
        runs: Paths of run directories.
    """
    several = list(dict.fromkeys(runs))
    for count in range(1, max(len(Path(run).parts) for run in [*several, "."]) + 1):
        labels = {run: str(Path(*Path(run).parts[-count:])) for run in several}
        if len(set(labels.values())) == len(several):
            return labels
    return {run: run for run in several}


def _cut(text: str, width: int) -> str:
    """Beginning and end of a text that is too long: runs' names differ at either."""
    half = (width - 1) // 2
    return text if len(text) <= width else f"{text[:half]}…{text[half + 1 - width :]}"


def _cells(row: dict[str, Any], baselines: Sequence[str]) -> list[str]:
    closed = row[CLOSED]
    return [
        row["type"],
        *(human(row[name]) if row[name] is not None else "-" for name in ("trainable", "shipped")),
        _with_interval(row["partial_r2"], row["partial_r2_ci95"], ""),
        _with_interval(row["r2"], row["r2_ci95"], ""),
        _number(row["val_r2"], ""),
        _number(closed["r2"] if closed else None, ""),
        *(_number(row["baselines"].get(name), "") for name in baselines),
    ]


def _number(value: float | None, sign: str) -> str:
    if value is None:
        return "-"
    return format(value, f"{sign}.3f" if abs(value) < 100 else f"{sign}.3g")


def _with_interval(value: float | None, interval: Sequence[float] | None, sign: str) -> str:
    if value is None or interval is None:
        return _number(value, sign)
    return f"{_number(value, sign)} [{', '.join(_number(end, sign) for end in interval)}]"


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    rest = zip(cells[1:], widths[1:], strict=True)
    return (
        "  "
        + " ".join([f"{_cut(cells[0], widths[0]):{widths[0]}}", *(f"{cell:{width}}" for cell, width in rest)]).rstrip()
    )


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _LINE, initial_indent=indent, subsequent_indent=f"{indent}  ", break_on_hyphens=False)
