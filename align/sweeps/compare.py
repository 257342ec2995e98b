"""A leaderboard of runs beside their closed-form optima and controls, with differences that were measured as pairs.

Two R2 with overlapping intervals may still differ beyond doubt, since documents are hard or easy for both: so a run is
called better than another only where the interval of the *difference*, both on the same resampled documents, leaves out
zero. The best run is chosen by the test figures it is compared with; among many runs some difference to it is chance.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from align.metrics import paired_difference, r2_interval
from align.moments.scatter import Array
from align.results import Documents, Metrics, PairDocuments, read_documents, read_metrics
from featstore.errors import AdapterError, MemberError
from featstore.runtime.console import human
from featstore.runtime.provenance import read_json
from featstore.text.roles import of_roles

DOCUMENTS = Documents.file

_FIGURES = ("r2", "r2_median_dim", "cosine_centered", "retrieval_top1", "retrieval_chance", "cka_debiased", "n")
_CLOSED = "closed_form"


@dataclass(frozen=True)
class _Sums:
    """A layer pair's entry of ``documents.json`` as arrays."""

    documents: tuple[int, ...]
    n: tuple[int, ...]
    sst: Array
    sse: Mapping[str, Array]

    @classmethod
    def of(cls, block: PairDocuments) -> _Sums:
        if not block.has("documents", "n", "sst", "sse"):
            raise ValueError("a layer pair lacks sums over documents")
        sse = {name: np.array(values, dtype=np.float64) for name, values in block.sse.items()}
        sums = cls(block.documents, block.n, np.array(block.sst, dtype=np.float64), sse)
        if {len(sums.n), *(len(v) for v in (sums.sst, *sse.values()))} != {len(sums.documents)}:
            raise ValueError("its lists of documents differ in length")
        return sums


@dataclass(eq=False)
class _Entry:
    """One layer pair of one run on its way into the table."""

    row: dict[str, Any]
    place: dict[str, Any]
    sums: _Sums | str
    rate: dict[str, Any] | None = None

    def interval(self) -> None:
        """Fill in the interval of R2 where the run did not write one down."""
        row = self.row
        if row["r2_ci95"] is not None:
            return
        if isinstance(self.sums, str):
            row["reasons"].setdefault("r2_ci95", self.sums)
        elif row["r2"] is None:
            row["reasons"].setdefault("r2_ci95", "R2 is undefined")
        elif "map" in self.sums.sse:
            interval, reason = r2_interval(self.sums.sse["map"], self.sums.sst)
            row["r2_ci95"] = None if interval is None else list(interval)
            if reason is not None:
                row["reasons"].setdefault("r2_ci95", reason)

    def minus(self, other: _Entry, name: str) -> tuple[dict[str, Any], str | None]:
        """The difference of R2 to a map of the other's (``map``, or a baseline), and why it has no interval."""
        theirs = other.row["r2"] if name == "map" else other.row["baselines"].get(name)
        known = self.row["r2"] is not None and theirs is not None
        found: dict[str, Any] = {"difference": self.row["r2"] - theirs if known else None, "ci95": None}
        interval, reason = self._paired(other, name) if known else (None, "R2 is undefined")
        if interval is not None:
            found["ci95"] = list(interval)
        return {**found, "verdict": _verdict(interval)}, reason

    def _paired(self, other: _Entry, name: str) -> tuple[tuple[float, float] | None, str | None]:
        mine, theirs = self.sums, other.sums
        for sums in (mine, theirs):
            if isinstance(sums, str):
                return None, sums
        if isinstance(mine, str) or isinstance(theirs, str) or "map" not in mine.sse or name not in theirs.sse:
            return None, f"{DOCUMENTS} has no sums of {name}; train again"
        if (mine.documents, mine.n) != (theirs.documents, theirs.n):
            return None, f"scored on other test rows than {other.row['run']}"
        found = paired_difference((mine.sse["map"], mine.sst), (theirs.sse[name], theirs.sst))
        return found.interval, found.reason


def _verdict(interval: tuple[float, float] | None) -> str:
    if interval is None:
        return "unknown"
    low, high = interval
    return "better" if low > 0 else "worse" if high < 0 else "no clear difference"


def compare_runs(directories: Sequence[Path]) -> dict[str, Any]:
    """Collect the test figures of several runs, best R2 first within each layer pair and set of rows.

    Args:
        directories: Run directories.

    Returns:
        ``rows``, each ``{"run", "type", "pair", "store", "set", "trainable", "shipped", "r2", "r2_ci95", ...,
        "closed_form": {"name", "r2"}, "baselines": {name: r2}, "versus_best": {"run", "difference", "ci95", "verdict"},
        "versus_closed_form": {...}, "warnings": [code], "reasons": {...}}``; ``sets``: what decides which rows were
        scored, figures of different sets are not compared; ``rate_distortion``: that of compressed runs, fewest bytes
        first.

    Raises:
        AdapterError: A directory holds no run, or a damaged one.
    """
    entries: list[_Entry] = []
    for directory in directories:
        if not (directory / Metrics.file).is_file() or not (directory / "adapter.json").is_file():
            raise AdapterError(f"no finished run in {str(directory)!r}; make one with `align train`")
        try:
            metrics = read_metrics(directory)
        except MemberError as error:
            raise _damaged(directory, error) from error
        card = read_json(directory / "adapter.json")
        try:
            entries += _entries(directory, metrics, card)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise _damaged(directory, error) from error
    places: list[dict[str, Any]] = []
    for entry in entries:
        if entry.place not in places:
            places.append(entry.place)
        entry.row["set"] = places.index(entry.place) + 1
        entry.interval()
    entries.sort(key=_order)
    for entry in entries:
        rivals = [e for e in entries if (e.row["pair"], e.row["set"]) == (entry.row["pair"], entry.row["set"])]
        _compare(entry, rivals[0])
    rates = [e.rate for e in entries if e.rate is not None]
    return {
        "rows": [entry.row for entry in entries],
        "sets": [{"set": number, **place} for number, place in enumerate(places, 1)],
        "rate_distortion": sorted(rates, key=lambda rate: rate.get("bytes_per_window") or math.inf),
    }


def _damaged(directory: Path, error: Exception) -> AdapterError:
    return AdapterError(f"the run in {str(directory)!r} is damaged ({error!r}); train it again")


def _order(entry: _Entry) -> tuple[Any, ...]:
    r2 = entry.row["r2"]
    return entry.row["pair"], entry.row["set"], r2 is None, -r2 if r2 is not None else 0.0


def _compare(entry: _Entry, best: _Entry) -> None:
    row = entry.row
    row["versus_best"] = row["versus_closed_form"] = None
    if entry is not best:
        difference, reason = entry.minus(best, "map")
        row["versus_best"] = {"run": best.row["run"], **difference}
        if reason is not None:
            row["reasons"]["versus_best.ci95"] = reason
    if row["closed_form"] is not None:
        row["versus_closed_form"], reason = entry.minus(entry, _CLOSED)
        if reason is not None:
            row["reasons"]["versus_closed_form.ci95"] = reason


def _entries(directory: Path, metrics: Metrics, card: dict[str, Any]) -> list[_Entry]:
    parameters = {entry["key"]: entry["parameters"] for entry in card["pairs"]}
    mask, store = card.get("mask") or {}, card.get("store") or {}
    # What decides which rows are scored. Splits are frozen in the store; where it lies does not matter.
    place = {
        "fingerprint": store.get("fingerprint"),
        "pair_policy": card.get("pair_policy"),
        "keep_sinks": mask.get("keep_sinks"),
        "roles": card.get("roles"),
        "sink_threshold": mask.get("sink_threshold"),
    }
    sums = read_documents(directory).pairs if (directory / DOCUMENTS).is_file() else None
    found = []
    for key, entry in metrics.pairs.items():
        test, closed = entry.test, entry.baselines.get(_CLOSED)
        own = parameters.get(key, {})
        row = {
            "run": str(directory),
            "type": metrics.type,
            "pair": key,
            "store": store.get("path"),
            "trainable": own.get("trainable"),
            "shipped": own.get("shipped"),
            **{name: getattr(test, name) for name in _FIGURES},
            "r2_ci95": None if test.r2_ci95 is None else list(test.r2_ci95),
            _CLOSED: None if closed is None else {"name": closed.name, "r2": closed.r2},
            "baselines": {name: None if scores is None else scores.r2 for name, scores in entry.baselines.items()},
            "warnings": [warning.code for warning in entry.warnings],
            "reasons": {
                name.removeprefix("test."): reason
                for name, reason in entry.reasons.items()
                if name.removeprefix("test.") in (*_FIGURES, "r2_ci95")
            },
        }
        rate = entry.rate_distortion
        found.append(
            _Entry(
                row,
                place,
                _sums_of(key, sums, entry.reasons),
                None if rate is None else {"run": str(directory), "pair": key, **rate.content()},
            )
        )
    return found


def _sums_of(key: str, pairs: Mapping[str, PairDocuments] | None, reasons: Mapping[str, str]) -> _Sums | str:
    if pairs is None:
        return f"the run has no {DOCUMENTS}: it was made by an earlier version; train again for intervals"
    if key not in pairs:
        return reasons.get("test.r2_ci95", f"{DOCUMENTS} says nothing of {key}; train again")
    if not pairs[key].content() and "test.r2_ci95" in reasons:
        return reasons["test.r2_ci95"]  # a run of a store without rows is whole, and says why it has no sums
    return _Sums.of(pairs[key])


# For people ---------------------------------------------------------------------------------------------------------

#: Characters of a line; notes are wrapped, and run names cut, to fit.
_LINE = 140
_CONTROLS = {"mean": "mean", "identity": "identity", "random_rotation": "rotation", "shuffled": "shuffled"}
_HEADS = (
    "run",
    "type",
    "trained",
    "shipped",
    "R2 [95 %]",
    "- best [95 %]",
    "optimum",
    "- optimum [95 %]",
    "best control",
)


def describe(result: dict[str, Any]) -> str:
    """The leaderboard as lines for people.

    Args:
        result: From :func:`compare_runs`.
    """
    rows = result["rows"]
    labels = _labels([row["run"] for row in rows])
    cells = [[labels[row["run"]], *_cells(row)] for row in rows]
    widths = [max(map(len, column)) for column in zip(_HEADS, *cells, strict=True)]
    widths[0] = max(min(widths[0], _LINE - 2 - sum(widths[1:]) - len(widths)), 8)
    lines = [_aligned(_HEADS, widths)]
    for (pair, number), block in _blocks(rows).items():
        several = len(result["sets"]) > 1
        lines += ["", f"{pair}, {block[0]['n']} test rows" + f", set {number}" * several]
        for row in block:
            lines.append(_aligned(cells[rows.index(row)], widths))
            if row["warnings"]:
                lines += _wrapped(f"warnings: {', '.join(row['warnings'])}", "    ")
        lines += _wrapped(_ranking(block, labels), "  ")
    lines += _notes(result, labels)
    return "\n".join(lines)


def _notes(result: dict[str, Any], labels: Mapping[str, str]) -> list[str]:
    lines = []
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
                missing.setdefault(reason, []).append(labels[row["run"]])
    for reason, runs in missing.items():
        lines += _wrapped(f"no interval: {reason} ({', '.join(dict.fromkeys(runs))})", "")
    if result["rate_distortion"]:
        # Only here: without compressed runs nothing of it is needed.
        from align.compress.report import table

        lines += ["", table(result["rate_distortion"])]
    return lines


def _blocks(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    blocks: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        blocks.setdefault((row["pair"], row["set"]), []).append(row)
    return blocks


def _labels(runs: Sequence[str]) -> dict[str, str]:
    """As much of the end of each path as tells the runs apart."""
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


def _cells(row: dict[str, Any]) -> list[str]:
    closed = row["closed_form"]
    controls = {short: row["baselines"].get(name) for name, short in _CONTROLS.items()}
    known = {name: value for name, value in controls.items() if value is not None}
    best = max(known, key=lambda name: known[name], default=None)
    return [
        row["type"],
        *(human(row[name]) if row[name] is not None else "-" for name in ("trainable", "shipped")),
        _with_interval(row["r2"], row["r2_ci95"], ""),
        _with_interval(*_difference(row["versus_best"]), "+"),
        _number(closed["r2"] if closed else None, ""),
        _with_interval(*_difference(row["versus_closed_form"]), "+"),
        "-" if best is None else f"{best} {known[best]:.2f}",
    ]


def _difference(versus: dict[str, Any] | None) -> tuple[float | None, list[float] | None]:
    return (None, None) if versus is None else (versus["difference"], versus["ci95"])


def _number(value: float | None, sign: str) -> str:
    if value is None:
        return "-"
    return format(value, f"{sign}.3f" if abs(value) < 100 else f"{sign}.3g")


def _with_interval(value: float | None, interval: list[float] | None, sign: str) -> str:
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


def _ranking(block: Sequence[dict[str, Any]], labels: Mapping[str, str]) -> str:
    """One sentence on what the intervals of the differences allow to say; empty for a single run."""
    verdicts: dict[str, list[str]] = {}
    for row in block[1:]:
        verdicts.setdefault(row["versus_best"]["verdict"], []).append(labels[row["run"]])
    # "worse" than the best is what the best is better than.
    words = {"worse": "better than", "no clear difference": "no clear difference to", "unknown": "no interval beside"}
    parts = [f"{word} {', '.join(verdicts[name])}" for name, word in words.items() if name in verdicts]
    return "; ".join([f"highest R2: {labels[block[0]['run']]}", *parts]) if parts else ""
