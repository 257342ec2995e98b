"""Figures of finished steps, read from the files their commands wrote.

What is not there is None: a step that failed leaves its questions open and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from align.metrics import paired_difference, r2_of
from align.results import Documents, EpochRecord, Metrics, PairDocuments, PairEpoch, PairMetrics, epoch_file
from align.statistics import Estimate, quotient
from evaluate.reproduce.places import Places
from evaluate.results import (
    Communication,
    Share,
    Stitched,
    StitchedDocuments,
    StitchedPair,
    StitchedSums,
    TaskAnswers,
)
from featstore.runtime.records import EMPTY, Interval, Record, read

_R = TypeVar("_R", bound=Record)
_COLUMNS = NDArray[np.float64]


@dataclass(frozen=True)
class Value:
    """A figure with its 95 % interval, where it has one."""

    value: float
    low: float | None = None
    high: float | None = None

    def less(self, constant: float) -> Value:
        """The figure with a constant taken off.

        Args:
            constant: 1 of a quotient, for what it is more than the same.
        """
        ends = (None if end is None else end - constant for end in (self.low, self.high))
        return Value(self.value - constant, *ends)

    def show(self, form: str = ".3f") -> str:
        """As text, the interval in brackets.

        Args:
            form: Of every number; ``.1%`` for shares.
        """
        if self.low is None or self.high is None:
            return format(self.value, form)
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"

    @classmethod
    def estimated(cls, estimate: Estimate | None, less: float = 0.0) -> Value | None:
        """From an estimate, None where there is none.

        Args:
            estimate: With its interval, where it has one.
            less: Is taken off: 1 of a quotient, for what it is more than the same.
        """
        return None if estimate is None else cls(estimate.value, estimate.low, estimate.high).less(less)

    @classmethod
    def of(cls, share: Share) -> Value | None:
        """From a value and its interval, None where there is no value."""
        return cls.between(share.value, share.ci95)

    @classmethod
    def between(cls, value: float | None, ci: Interval | None) -> Value | None:
        """From a value and the ends of its interval, either of which may be missing."""
        if value is None:
            return None
        low, high = ci if ci is not None else (None, None)
        return cls(value, low, high)


class Evidence:
    """What a directory of the programme holds.

    Args:
        out: The directory.
        places: Layer pairs of its store.
    """

    def __init__(self, out: Path, places: Places) -> None:
        self.out, self.places = out, places
        self._files: dict[Path, Record | None] = {}

    def _read(self, kind: type[_R], where: str, name: str | None = None) -> _R | None:
        """A result below the directory, None if there is none; read once."""
        path = self.out / where / (name or kind.file)
        if path not in self._files:
            self._files[path] = read(kind, path) if path.is_file() else None
        found = self._files[path]
        return found if isinstance(found, kind) else None

    @cached_property
    def runs(self) -> list[str]:
        """Names of the finished runs."""
        return sorted(path.parent.name for path in self.out.glob("runs/*/adapter.json"))

    def pairs(self, run: str) -> Mapping[str, PairMetrics]:
        """A run's part of ``metrics.json`` by layer pair; empty where it is not done."""
        metrics = self._read(Metrics, f"runs/{run}")
        return EMPTY if metrics is None else metrics.pairs

    def stitched(self, run: str, key: str, into: str = "") -> StitchedPair | None:
        """A layer pair's part of ``stitch.json``."""
        stitched = self._read(Stitched, f"runs/{run}/{into}")
        return None if stitched is None else stitched.pairs.get(key)

    def stitched_sums(self, run: str, key: str) -> StitchedSums | None:
        """A layer pair's sums of stitched losses by document."""
        found = self._read(StitchedDocuments, f"runs/{run}")
        return None if found is None else found.pairs.get(key)

    def recovered(self, run: str, key: str, *, token: bool = False, into: str = "") -> Value | None:
        """Share of the stitched loss recovered, from the mean state or from the source's token alone."""
        entry = self.stitched(run, key, into)
        return None if entry is None else Value.of(entry.recovered_token if token else entry.recovered)

    def beyond_token(self, run: str, key: str, into: str = "") -> Value | None:
        """Nats per token by which mapped states do better than the prediction from the source's token alone."""
        entry = self.stitched(run, key, into)
        return None if entry is None else Value.between(entry.beyond_token.nats, entry.beyond_token.ci95)

    def tasks(self, run: str) -> Mapping[str, TaskAnswers]:
        """A run's part of ``communicate.json`` by task; empty where it is not done."""
        answers = self._read(Communication, f"runs/{run}")
        return EMPTY if answers is None else answers.tasks

    def epoch(self, run: str, number: int) -> EpochRecord | None:
        """One epoch of a trained run."""
        return self._read(EpochRecord, f"runs/{run}", epoch_file(number))

    def test(self, run: str, key: str, name: str = "r2") -> Value | None:
        """A test figure of a layer pair, None where there is none."""
        entry = self.pairs(run).get(key)
        if entry is None:
            return None
        return Value.between(getattr(entry.test, name), getattr(entry.test, f"{name}_ci95", None))

    def validated(self, run: str, key: str) -> float | None:
        """Validation R2 of a layer pair, by which things are chosen; None where there is none."""
        entry = self.pairs(run).get(key)
        return None if entry is None or entry.val is None else entry.val.r2

    def curve(self, run: str, key: str, figure: Callable[[PairEpoch], float | None]) -> list[float]:
        """A validation figure of a layer pair by epoch, that before training first.

        Args:
            run: A trained run.
            key: Layer pair.
            figure: Of an epoch.
        """
        found: list[float] = []
        while (epoch := self.epoch(run, len(found))) is not None:
            value = figure(epoch.pairs[key]) if key in epoch.pairs else None
            if value is None:
                break
            found.append(float(value))
        return found

    def difference(self, first: tuple[str, str], second: tuple[str, str]) -> Value | None:
        """R2 of one run's layer pair minus another's, over the same documents.

        Args:
            first: Run and layer pair.
            second: The same.
        """
        here, there = self._sums(*first), self._sums(*second)
        values = self.test(*first), self.test(*second)
        if here is None or there is None or values[0] is None or values[1] is None:
            return None
        return Value.between(values[0].value - values[1].value, paired_difference(here, there).interval)

    def ratio(self, first: tuple[str, str], second: tuple[str, str]) -> Value | None:
        """R2 of one run's layer pair over another's, on the same documents; None where the other's is not positive.

        Its interval is Fieller's (:func:`align.statistics.quotient`).

        Args:
            first: Run and layer pair.
            second: The same.
        """
        here, there = self._sums(*first), self._sums(*second)
        values = self.test(*first), self.test(*second)
        if here is None or there is None or values[0] is None or values[1] is None or values[1].value <= 0:
            return None
        ci = quotient(r2_of(*here), r2_of(*there)).interval if len(here[0]) == len(there[0]) else None
        return Value.between(values[0].value / values[1].value, ci)

    def sums(self, run: str, key: str) -> PairDocuments | None:
        """A layer pair's sums of squares by document, those of its own map among them."""
        documents = self._read(Documents, f"runs/{run}")
        entry = None if documents is None else documents.pairs.get(key)
        return None if entry is None or "map" not in entry.sse else entry

    def _sums(self, run: str, key: str) -> tuple[_COLUMNS, _COLUMNS] | None:
        entry = self.sums(run, key)
        if entry is None:
            return None
        return np.array(entry.sse["map"], dtype=np.float64), np.array(entry.sst, dtype=np.float64)
