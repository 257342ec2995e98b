"""Runs as rows of a table: what `align train` wrote of each layer pair, and the sums behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.maps.card import REMEDY, Card, read_card
from align.metrics import r2_interval
from align.results import Documents, Metrics, PairDocuments
from align.sweeps.differences import MAP, Sums
from featstore.errors import AdapterError, CorruptDataError
from featstore.runtime.records import read, retold
from featstore.runtime.schema import shown

CLOSED = "closed_form"
_FIGURES = ("r2", "r2_median_dim", "cosine_centered", "retrieval_top1", "retrieval_chance", "cka_debiased", "n")
#: Beside those that every run has: what is left beyond the source's current token.
_BEYOND = ("partial_r2", "partial_r2_ci95")


@dataclass(eq=False)
class Entry:
    """One layer pair of one run on its way into the table.

    Attributes:
        row: What the table shows.
        place: What decides which rows were scored.
        sums: By document, or why there are none.
        rate: Its point of the rate-distortion table; None where the run does not compress.
    """

    row: dict[str, Any]
    place: dict[str, Any]
    sums: Sums | str
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
        elif MAP in self.sums.sse:
            interval, reason = r2_interval(self.sums.sse[MAP], self.sums.sst)
            row["r2_ci95"] = None if interval is None else list(interval)
            if reason is not None:
                row["reasons"].setdefault("r2_ci95", reason)


def read_entries(directory: Path) -> list[Entry]:
    """Read the layer pairs of a run.

    Args:
        directory: Of the run.

    Raises:
        AdapterError: There is no finished run, or a damaged one.
    """
    if not (directory / Metrics.file).is_file() or not (directory / Card.file).is_file():
        raise AdapterError(f"no finished run in {str(directory)!r}; make one with `align train`")
    try:
        metrics = read(Metrics, directory, remedy=REMEDY)
        sums = read(Documents, directory, remedy=REMEDY).pairs if (directory / Documents.file).is_file() else None
    except CorruptDataError as error:
        raise retold(error, AdapterError, REMEDY) from error
    return _entries(directory, metrics, sums, read_card(directory))


def _entries(directory: Path, metrics: Metrics, sums: Mapping[str, PairDocuments] | None, card: Card) -> list[Entry]:
    parameters = {entry.key: entry.parameters for entry in card.pairs}
    # What decides which rows are scored. Splits are frozen in the store; where it lies does not matter.
    place = {
        "fingerprint": card.store.fingerprint,
        "pair_policy": card.pair_policy,
        "keep_sinks": card.mask.keep_sinks,
        "roles": None if card.roles is None else list(card.roles),
        "sink_threshold": card.mask.sink_threshold,
    }
    found = []
    for key, entry in metrics.pairs.items():
        test, closed = entry.test, entry.baselines.get(CLOSED)
        own = parameters.get(key)
        if own is None:
            raise AdapterError(
                f"{directory / Metrics.file}: /pairs names {shown(key)}, which the card does not; {REMEDY}"
            )
        beyond = {name: getattr(test, name, None) for name in _BEYOND}
        row = {
            "run": str(directory),
            "type": metrics.type,
            "pair": key,
            "store": card.store.path,
            "trainable": own.trainable,
            "shipped": own.shipped,
            **{name: list(value) if isinstance(value, tuple) else value for name, value in beyond.items()},
            **{name: getattr(test, name) for name in _FIGURES},
            "r2_ci95": None if test.r2_ci95 is None else list(test.r2_ci95),
            "val_r2": None if entry.val is None else entry.val.r2,
            CLOSED: None if closed is None else {"name": closed.name, "r2": closed.r2},
            "baselines": {name: None if scores is None else scores.r2 for name, scores in entry.baselines.items()},
            "warnings": [warning.code for warning in entry.warnings],
            "reasons": {
                name.removeprefix("test."): reason
                for name, reason in entry.reasons.items()
                if name.removeprefix("test.") in (*_FIGURES, *_BEYOND, "r2_ci95")
            },
        }
        rate = entry.rate_distortion
        found.append(
            Entry(
                row,
                place,
                _sums_of(directory / Documents.file, key, sums, entry.reasons),
                None if rate is None else {"run": str(directory), "pair": key, **rate.content()},
            )
        )
    return found


def _sums_of(
    where: Path, key: str, pairs: Mapping[str, PairDocuments] | None, reasons: Mapping[str, str]
) -> Sums | str:
    if pairs is None:
        return f"the run has no {Documents.file}: it was made by an earlier version; train again for intervals"
    if key not in pairs:
        return reasons.get("test.r2_ci95", f"{Documents.file} says nothing of {key}; train again")
    if pairs[key].has("documents", "n", "sst", "sse"):
        return Sums.of(pairs[key])
    if "test.r2_ci95" in reasons:
        return reasons["test.r2_ci95"]  # a run of a store without rows is whole, and says why it has no sums
    raise AdapterError(f"{where}: /pairs/{key} has no sums, expected documents, n, sst and sse; {REMEDY}")
