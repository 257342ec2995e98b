"""Two runs side by side: what `align compare --changes` says as a record, with a picture and a readable form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from align.sweeps.changes import describe_changes, verdict_counts
from align.sweeps.table import labels_of
from featstore.runtime.extras import extras_named
from featstore.runtime.records import EMPTY, Interval, Number, Record, Table, Whole, frame
from featstore.runtime.sheets import Sheet, counted, number, with_interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from rich.console import RenderableType


class Change(Record):
    """The maps of one layer pair in both runs. Lists hold the first run's value and then the second's.

    Attributes:
        pair: Layer pair.
        types: Types of map.
        r2: Pooled R2 on test rows.
        r2_ci95: Their 95 % intervals over documents.
        difference: R2 of the second less that of the first; null where the two were not scored on the same rows.
        ci95: Its 95 % interval over documents.
        p: Two-sided p value of no difference.
        p_adjusted: The same, adjusted for all differences (Holm).
        verdict: What is said of the second: ``better`` or ``worse`` where the adjusted p value is at most 5 %, ``no
            clear difference``, or ``unknown`` where nothing can be tested.
        figures: Other figures by name: R2 beyond the token, R2 on validation rows, retrieval, cosine, parameters.
        baselines: R2 of baselines and controls by name.
        warnings_gone: Codes of warnings that only the first run has.
        warnings_new: Codes of warnings that only the second run has.
        reason: Why there is no difference, or no test of it.
    """

    pair: str
    types: tuple[str, ...] = ()
    r2: tuple[Number | None, ...] = ()
    r2_ci95: tuple[Interval | None, ...] = ()
    difference: Number | None = None
    ci95: Interval | None = None
    p: Number | None = None
    p_adjusted: Number | None = None
    verdict: str = "unknown"
    figures: Table[tuple[Number | None, ...]] = EMPTY
    baselines: Table[tuple[Number | None, ...]] = EMPTY
    warnings_gone: tuple[str, ...] = ()
    warnings_new: tuple[str, ...] = ()
    reason: str | None = None


class Unmatched(Record):
    """A map that only one of the runs has.

    Attributes:
        pair: Layer pair.
        type: Type of map.
        r2: Pooled R2 on test rows.
        r2_ci95: Its 95 % interval over documents.
    """

    pair: str
    type: str
    r2: Number | None = None
    r2_ci95: Interval | None = None


class Changes(Record):
    """What :func:`align.changes` found, the largest loss of R2 first.

    Attributes:
        first: Directory of the first run.
        second: Directory of the second run.
        both: Layer pairs of both.
        only_first: Maps that only the first run has.
        only_second: Maps that only the second run has.
        tests: How many differences were judged together.
    """

    made_by: ClassVar[str] = "align compare --changes"

    first: str
    second: str
    both: tuple[Change, ...] = ()
    only_first: tuple[Unmatched, ...] = ()
    only_second: tuple[Unmatched, ...] = ()
    tests: Whole = 0

    def to_pandas(self) -> pd.DataFrame:
        """One row for every layer pair of both runs.

        What both have becomes two columns, such as ``r2_first`` and ``r2_second``; the interval of the difference is
        ``low`` and ``high``; codes of warnings are joined by commas.
        """
        return frame(map(_columns, self.both))

    @extras_named()
    def plot(self) -> Figure:
        """Draw the difference of R2 of every layer pair with its 95 % interval, from the largest loss down."""
        from featstore.runtime.drawing import draw_points, panels

        first, second = self._labels()
        # A quarter of an inch a line, and room for the axis.
        figure, [axes] = panels([f"{second} minus {first}"], height=max(3.2, 0.8 + 0.25 * len(self.both)))
        draw_points(axes, [(change.pair, change.difference, change.ci95) for change in self.both])
        axes.axvline(0.0, color="0.6", linewidth=1, linestyle="dashed", zorder=0)
        axes.set_xlabel("difference of R2 on test rows")
        return figure

    def __rich__(self) -> RenderableType:
        """A table for a terminal."""
        return self._sheet().__rich__()

    def __repr__(self) -> str:
        """One line."""
        said = verdict_counts([change.content() for change in self.both])
        counts = ", ".join(f"{count} {verdict}" for verdict, count in said.items())
        pairs = counted(len(self.both), "layer pair")
        return f"<Changes {self.first!r} to {self.second!r}: {pairs} in both{counts and ', '}{counts}>"

    def __str__(self) -> str:
        """The lines that `align compare --changes` prints."""
        return describe_changes(self.content())

    def _repr_html_(self) -> str:
        return self._sheet().html()

    def _labels(self) -> tuple[str, str]:
        labels = labels_of([self.first, self.second])
        return labels[self.first], labels[self.second]

    def _sheet(self) -> Sheet:
        first, second = self._labels()
        heads = ("layers", "type", f"{first}, R2", f"{second}, R2", "difference [95 %]", "adjusted p", "verdict")
        rows = [
            (
                change.pair,
                " -> ".join(dict.fromkeys(change.types)),
                *(with_interval(value, ends) for value, ends in zip(change.r2, change.r2_ci95, strict=True)),
                with_interval(change.difference, change.ci95, "+.3f"),
                number(change.p_adjusted, ".2g"),
                change.verdict,
            )
            for change in self.both
        ]
        notes = [f"{change.pair}: {change.reason}" for change in self.both if change.reason]
        for signs, name in (("no longer warned of", "warnings_gone"), ("now warned of", "warnings_new")):
            notes += [f"{c.pair}: {signs} {', '.join(getattr(c, name))}" for c in self.both if getattr(c, name)]
        for name, alone in ((first, self.only_first), (second, self.only_second)):
            notes += [
                f"only in {name}: {row.pair}, {row.type}, R2 {with_interval(row.r2, row.r2_ci95)}" for row in alone
            ]
        return Sheet(f"from {first} to {second}", heads, tuple(rows), tuple(notes))


def _columns(change: Change) -> dict[str, Any]:
    low, high = change.ci95 or (None, None)
    pairs = {"type": change.types, "r2": change.r2, **change.figures}
    pairs |= {f"baseline_{name}": values for name, values in change.baselines.items()}
    return {
        "pair": change.pair,
        **{
            f"{name}_{side}": v for name, two in pairs.items() for side, v in zip(("first", "second"), two, strict=True)
        },
        "difference": change.difference,
        "low": low,
        "high": high,
        "p": change.p,
        "p_adjusted": change.p_adjusted,
        "verdict": change.verdict,
        "warnings_gone": ", ".join(change.warnings_gone),
        "warnings_new": ", ".join(change.warnings_new),
        "reason": change.reason,
    }
