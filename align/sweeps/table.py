"""The leaderboard as lines for people."""

from __future__ import annotations

import math
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
#: Rows that people read on a terminal; sets of rows and runs that a note names.
_MOST, _SETS, _NAMED = 200, 20, 20
BASELINES = {"token": "token", "identity": "identity", "random_rotation": "rotation", "shuffled": "shuffled"}
_HEADS = ("run", "type", "trained", "shipped", "beyond token [95 %]", "R2 [95 %]", "val R2", "optimum")


def describe(result: dict[str, Any], most: int = _MOST, *, controls: bool = False) -> str:
    """The leaderboard as lines for people.

    Of a table of very many layer pairs the first and the last blocks by validation R2 are shown, and how many are not;
    what is not shown here stands in ``--json``.

    Args:
        result: From :func:`align.sweeps.compare.compare_runs`.
        most: Rows that are shown.
        controls: Whether R2 of the controls stands beside that of the maps.
    """
    labels = labels_of([row["run"] for row in result["rows"]])
    every = _blocks(result["rows"])
    shown = _shown(every, most)
    rows = [row for place in shown for row in every[place]]
    # A column that nobody has is left out: runs of former versions know no baseline of the token.
    baselines = [name for name in BASELINES if controls and any(row["baselines"].get(name) is not None for row in rows)]
    columns = [[*_HEADS, *(BASELINES[name] for name in baselines)]]
    columns += [[*map(inline, (labels[row["run"]], *_cells(row, baselines)))] for row in rows]
    if all(row["partial_r2"] is None for row in rows):
        columns = [[*line[:4], *line[5:]] for line in columns]
    heads, *cells = columns
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    widths[0] = max(min(widths[0], _LINE - 2 - sum(widths[1:]) - len(widths)), 8)
    lines, lines_of_rows = [_aligned(heads, widths)], iter(cells)
    chosen = {(each["pair"], each["set"]): each for each in result["chosen"]}
    several = len(result["sets"]) > 1
    for pair, number in shown:
        block = every[pair, number]
        lines += ["", f"{inline(pair)}, {block[0]['n']} test rows" + f", set {number}" * several]
        for row in block:
            lines.append(_aligned(next(lines_of_rows), widths))
            if row["warnings"]:
                lines += wrapped(f"warnings: {', '.join(row['warnings'])}", "    ")
        for line in _differences(block, labels):
            lines += wrapped(line, "  ")
        if each := chosen.get((pair, number)):
            test = with_interval(each["r2"], each["r2_ci95"], "")
            lines += wrapped(f"validation chooses {labels[each['run']]}: test R2 {test}", "  ")
    if len(shown) < len(every):
        left = sum(len(block) for block in every.values()) - len(rows)
        more = len(every) - len(shown)
        text = (
            f"{more} more layer {'pair' if more == 1 else 'pairs'} ({left} rows) {'is' if more == 1 else 'are'} not "
            "shown: those above have the highest and "
            "the lowest validation R2; --json has all of them"
        )
        lines += ["", *wrapped(text, "")]
    lines += _notes(result, labels)
    return "\n".join(lines)


def _shown(blocks: Mapping[tuple[str, int], Sequence[dict[str, Any]]], most: int) -> list[tuple[str, int]]:
    """The blocks that fit, in the order of the table: all, or the best and the worst by validation."""
    if sum(map(len, blocks.values())) <= most:
        return list(blocks)
    # Rows of a block stand in the order of their validation R2; one without is no good news.
    ranked = sorted(blocks, key=lambda place: -_validated(blocks[place][0]))
    kept: set[tuple[str, int]] = set()
    # The best take three places of four.
    for ends, share in ((ranked, most * 3 // 4), (ranked[::-1], most - most * 3 // 4)):
        used = 0
        for place in ends:
            if used + len(blocks[place]) > max(share, len(blocks[ends[0]])) or place in kept:
                break
            used += len(blocks[place])
            kept.add(place)
    return [place for place in blocks if place in kept]


def _validated(row: Mapping[str, Any]) -> float:
    return -math.inf if row["val_r2"] is None else row["val_r2"]


def _differences(block: Sequence[dict[str, Any]], labels: Mapping[str, str]) -> Iterator[str]:
    for row in block:
        versus = row["versus_reference"]
        if versus is not None:
            other = f"{versus['baseline']} of its own" if versus["baseline"] else labels[versus["run"]]
            yield f"{labels[row['run']]} - {other}: {_said(versus)}"
        if row["versus_closed_form"] is not None:
            yield f"{labels[row['run']]} - its optimum, {row[CLOSED]['name']}: {_said(row['versus_closed_form'])}"


def _said(versus: Mapping[str, Any]) -> str:
    found = f"R2 {with_interval(versus['difference'], versus['ci95'], '+')}"
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
        lines += wrapped(f"{text} of the table (Holm, 5 %)", "")
    if len(result["sets"]) > 1:
        lines += ["", "Sets are of different rows, so figures of one are not compared with those of another:"]
        stores_of: dict[int, set[str]] = {}
        for row in result["rows"]:
            stores_of.setdefault(row["set"], set()).add(row["store"] or "?")
        for each in result["sets"][:_SETS]:
            stores = sorted(stores_of[each["set"]])
            sinks = "kept" if each["keep_sinks"] else f"masked beyond {each['sink_threshold']} x the median norm"
            fingerprint = (each["fingerprint"] or "unknown")[:12]
            pairs = f"pairs {each['pair_policy']}{of_roles(each['roles'])}"
            text = f"set {each['set']}: {', '.join(stores)} ({fingerprint}), {pairs}, sinks {sinks}"
            lines += wrapped(text, "  ")
        if len(result["sets"]) > _SETS:
            lines.append(f"  and {len(result['sets']) - _SETS} more sets; --json has all of them")
    missing: dict[str, list[str]] = {}
    for row in result["rows"]:
        for name, reason in row["reasons"].items():
            if name.endswith("ci95"):
                missing.setdefault(f"no interval: {reason}", []).append(labels[row["run"]])
            elif name == "versus_reference":
                missing.setdefault(f"not compared: {reason}", []).append(labels[row["run"]])
    for reason, runs in missing.items():
        names = list(dict.fromkeys(runs))
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        lines += wrapped(f"{reason} ({', '.join(names[:_NAMED])}{more})", "")
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
        with_interval(row["partial_r2"], row["partial_r2_ci95"], ""),
        with_interval(row["r2"], row["r2_ci95"], ""),
        _number(row["val_r2"], ""),
        _number(closed["r2"] if closed else None, ""),
        *(_number(row["baselines"].get(name), "") for name in baselines),
    ]


def _number(value: float | None, sign: str) -> str:
    if value is None:
        return "-"
    return format(value, f"{sign}.3f" if abs(value) < 100 else f"{sign}.3g")


def with_interval(value: float | None, interval: Sequence[float] | None, sign: str = "") -> str:
    """A figure and its interval, to three places.

    Args:
        value: None is a dash.
        interval: Its two ends, where there is one.
        sign: ``+`` for a figure that always has a sign.
    """
    if value is None or interval is None:
        return _number(value, sign)
    return f"{_number(value, sign)} [{', '.join(_number(end, sign) for end in interval)}]"


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    rest = zip(cells[1:], widths[1:], strict=True)
    return (
        "  "
        + " ".join([f"{_cut(cells[0], widths[0]):{widths[0]}}", *(f"{cell:{width}}" for cell, width in rest)]).rstrip()
    )


def wrapped(text: str, indent: str) -> list[str]:
    """Lines of at most a table's width.

    Args:
        text: To be wrapped.
        indent: Before the first line; later ones have two spaces more.
    """
    return textwrap.wrap(text, _LINE, initial_indent=indent, subsequent_indent=f"{indent}  ", break_on_hyphens=False)
