"""Several runs side by side: the table of `align compare` as a record, with a picture and a readable form."""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING, Any, ClassVar

from align.results import RatePoint
from align.sweeps.table import describe
from featstore.errors import SpecError
from featstore.runtime.extras import extras_named
from featstore.runtime.records import EMPTY, Flag, Interval, Number, Record, Table, Whole, flat, frame
from featstore.runtime.sheets import NONE, Sheet, counted, number, with_interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from rich.console import RenderableType

    from featstore.runtime.drawing import Point

PLOTS = ("scores", "rate")


class Versus(Record):
    """A difference of R2, both maps on the same documents.

    Attributes:
        run: The other run; null where it is a baseline of the same run, absent where it is its closed form.
        baseline: Name of the baseline; null where it is a run.
        difference: R2 of this map minus the other's.
        ci95: Its 95 % interval.
        p: Two-sided p value of no difference.
        p_adjusted: The same, adjusted for all differences of the table (Holm).
        verdict: ``better`` or ``worse`` where the adjusted p value is at most 5 %, ``no clear difference``, or
            ``unknown`` where nothing can be tested.
    """

    run: str | None = None
    baseline: str | None = None
    difference: Number | None = None
    ci95: Interval | None = None
    p: Number | None = None
    p_adjusted: Number | None = None
    verdict: str = "unknown"


class Reference(Record):
    """What the runs are compared with.

    Attributes:
        run: A run directory; null for a baseline.
        baseline: A baseline of every run; null for a run.
        named: Whether it was named; else it is the run given first that has the layer pair.
    """

    run: str | None = None
    baseline: str | None = None
    named: Flag | None = None


class Choice(Record):
    """The run that validation chooses, and its test figure.

    Attributes:
        pair: Layer pair.
        set: Number of the set of rows.
        run: Run directory.
        val_r2: The highest validation R2 of the runs.
        r2: Test R2 of that run.
        r2_ci95: Its 95 % interval over documents.
    """

    pair: str
    set: Whole
    run: str
    val_r2: Number | None = None
    r2: Number | None = None
    r2_ci95: Interval | None = None


class Optimum(Record):
    """The closed form by which a map is judged.

    Attributes:
        name: Which one.
        r2: On the same test rows.
    """

    name: str | None = None
    r2: Number | None = None


class Row(Record):
    """The map of one layer pair of one run, on test rows.

    Attributes:
        run: Run directory.
        type: Type of map.
        pair: Layer pair.
        store: Path of the store.
        set: Number of the set of rows, see :class:`RowSet`; figures of different sets are not compared.
        trainable: Parameters that were fitted.
        shipped: Numbers needed to apply the map.
        n: Test rows.
        partial_r2: R2 beyond the prediction from the source's current token alone.
        partial_r2_ci95: Its 95 % interval over documents.
        r2: Pooled R2.
        r2_ci95: Its 95 % interval over documents.
        val_r2: R2 on validation rows, by which runs are chosen.
        r2_median_dim: Median over dimensions.
        cosine_centered: Mean cosine about the target's train mean.
        retrieval_top1: Share of mapped states whose nearest state is their own partner.
        retrieval_chance: The same of a map that knows nothing.
        cka_debiased: Debiased CKA of mapped and true states.
        closed_form: The optimum of the map's class.
        baselines: R2 of baselines and controls by name.
        versus_reference: Difference to the reference; None of the reference itself.
        versus_closed_form: Difference to the optimum; None where that is the reference.
        warnings: Codes of what a careful reader would object to.
        reasons: Why a figure is null.
    """

    run: str
    type: str
    pair: str
    set: Whole
    store: str | None = None
    trainable: Whole | None = None
    shipped: Whole | None = None
    n: Whole | None = None
    partial_r2: Number | None = None
    partial_r2_ci95: Interval | None = None
    r2: Number | None = None
    r2_ci95: Interval | None = None
    val_r2: Number | None = None
    r2_median_dim: Number | None = None
    cosine_centered: Number | None = None
    retrieval_top1: Number | None = None
    retrieval_chance: Number | None = None
    cka_debiased: Number | None = None
    closed_form: Optimum | None = None
    baselines: Table[Number | None] = EMPTY
    versus_reference: Versus | None = None
    versus_closed_form: Versus | None = None
    warnings: tuple[str, ...] = ()
    reasons: Table[str] = EMPTY


class RowSet(Record):
    """What decides which rows are scored.

    Attributes:
        set: Its number.
        fingerprint: Of the store.
        pair_policy: How tokens are paired.
        keep_sinks: Whether attention sinks are scored.
        roles: The roles whose rows are scored; null for all.
        sink_threshold: Multiple of the median norm beyond which a row is one.
    """

    set: Whole
    fingerprint: str | None = None
    pair_policy: str | None = None
    keep_sinks: Flag | None = None
    roles: tuple[str, ...] | None = None
    sink_threshold: Number | None = None


class RunRate(RatePoint):
    """The point of a compressed run in the rate-distortion table.

    Attributes:
        run: Run directory.
        pair: Layer pair.
    """

    run: str = ""
    pair: str = ""


class Leaderboard(Record):
    """What :func:`align.compare` found, highest validation R2 first within each layer pair and set of rows.

    Attributes:
        rows: The maps.
        reference: What they are compared with.
        tests: How many differences were judged together.
        chosen: What validation chooses of several runs.
        sets: The sets of rows that they were scored on.
        rate_distortion: Points of compressed runs, fewest bytes first.
    """

    made_by: ClassVar[str] = "align compare"

    rows: tuple[Row, ...] = ()
    reference: Reference = Reference()
    tests: Whole = 0
    chosen: tuple[Choice, ...] = ()
    sets: tuple[RowSet, ...] = ()
    rate_distortion: tuple[RunRate, ...] = ()

    def to_pandas(self) -> pd.DataFrame:
        """One row for every map.

        Baselines become columns ``baseline_<name>``, the optimum ``closed_form`` and ``closed_form_r2``, differences
        ``versus_reference_difference``, ``_low``, ``_high``, ``_p``, ``_p_adjusted`` and ``_verdict``; warnings are
        joined by commas.
        """
        return frame({**flat(row), **_more(row)} for row in self.rows)

    @extras_named()
    def plot(self, kind: str | None = None) -> Figure:
        """Draw the leaderboard.

        Args:
            kind: ``scores``: R2 of every run with its interval, a panel for each layer pair and set of rows. ``rate``:
                R2 against bytes of compressed runs. None: the rates where all runs are compressed at two rates or more.

        Raises:
            SpecError: Another kind, or rates without compressed runs.
        """
        rates = {point.bytes_per_text_byte for point in self.rate_distortion}
        all_compressed = len(self.rate_distortion) == len(self.rows)
        kind = kind or ("rate" if all_compressed and len(rates) > 1 else "scores")
        if kind not in PLOTS:
            raise SpecError(f"plot {kind!r}: choose one of {', '.join(PLOTS)}")
        if kind == "scores":
            return self._scores()
        if not self.rate_distortion:
            raise SpecError("no run is of type compress, so there are no rates; plot 'scores'")
        # Only here: matplotlib takes half a second to import.
        from align.runs.plots import draw_rate_distortion

        return draw_rate_distortion([point.content() for point in self.rate_distortion])

    def __rich__(self) -> RenderableType:
        """A table for each layer pair, for a terminal."""
        from rich.console import Group

        return Group(*(sheet.__rich__() for sheet in self._sheets()))

    def __repr__(self) -> str:
        """One line."""
        runs = counted(len({row.run for row in self.rows}), "run")
        pairs = counted(len({row.pair for row in self.rows}), "layer pair")
        said = [v.verdict for row in self.rows for v in (row.versus_reference, row.versus_closed_form) if v]
        verdicts = ", ".join(f"{said.count(word)} {word}" for word in dict.fromkeys(said))
        reference = self.reference.baseline or self.reference.run
        return f"<Leaderboard {runs}, {pairs}, reference {reference!r}{verdicts and ': '}{verdicts}>"

    def __str__(self) -> str:
        """The lines that `align compare` prints."""
        return describe(self.content())

    def _repr_html_(self) -> str:
        return "".join(sheet.html() for sheet in self._sheets())

    def _blocks(self) -> dict[tuple[str, int], list[Row]]:
        blocks: dict[tuple[str, int], list[Row]] = {}
        for row in self.rows:
            blocks.setdefault((row.pair, row.set), []).append(row)
        return blocks

    def _title(self, pair: str, number_of_set: int) -> str:
        return f"{pair}, set {number_of_set}" if len(self.sets) > 1 else pair

    def _sheets(self) -> list[Sheet]:
        labels = self._labels()
        heads = (
            "run", "type", "beyond token", "R2 [95 %]", "val R2", "minus reference", "verdict", "optimum",
            "minus optimum", "verdict",
        )  # fmt: skip
        sheets = []
        for key, block in self._blocks().items():
            rows, notes = [], []
            for row in block:
                other, closed = row.versus_reference, row.versus_closed_form
                rows.append(
                    (
                        labels[row.run],
                        row.type,
                        with_interval(row.partial_r2, row.partial_r2_ci95),
                        with_interval(row.r2, row.r2_ci95),
                        number(row.val_r2),
                        *_versus(other),
                        number(row.closed_form.r2 if row.closed_form else None),
                        *_versus(closed),
                    )
                )
                notes += [f"{labels[row.run]}: {', '.join(row.warnings)}"] if row.warnings else []
            notes += [
                f"validation chooses {labels[one.run]}: test R2 {with_interval(one.r2, one.r2_ci95)}"
                for one in self.chosen
                if (one.pair, one.set) == key
            ]
            sheets.append(Sheet(f"{self._title(*key)}, {block[0].n} test rows", heads, tuple(rows), tuple(notes)))
        return sheets

    def _labels(self) -> dict[str, str]:
        """Names of the run directories, where these tell the runs apart."""
        runs = dict.fromkeys(row.run for row in self.rows)
        names = {run: PurePath(run).name for run in runs}
        return names if len(set(names.values())) == len(names) else {run: run for run in runs}

    def _scores(self) -> Figure:
        from featstore.runtime.drawing import draw_points, panels

        blocks, labels = self._blocks(), self._labels()
        figure, axes = panels([self._title(*key) for key in blocks])
        for panel, block in zip(axes, blocks.values(), strict=True):
            points: list[Point] = [(labels[row.run], row.r2, row.r2_ci95) for row in block]
            draw_points(panel, points)
            panel.set_xlabel("R2 on test rows")
        return figure


def _versus(versus: Versus | None) -> tuple[str, str]:
    if versus is None:
        return NONE, NONE
    adjusted = "" if versus.p_adjusted is None else f" (p {versus.p_adjusted:.2g})"
    return with_interval(versus.difference, versus.ci95, "+.3f"), f"{versus.verdict}{adjusted}"


def _more(row: Row) -> dict[str, Any]:
    more: dict[str, Any] = {f"baseline_{name}": value for name, value in row.baselines.items()}
    more |= {"closed_form": row.closed_form.name, "closed_form_r2": row.closed_form.r2} if row.closed_form else {}
    for name, versus in (("versus_reference", row.versus_reference), ("versus_closed_form", row.versus_closed_form)):
        if versus is not None:
            more |= {
                f"{name}_{column}": value for column, value in flat(versus).items() if column not in ("run", "baseline")
            }
    return {**more, "warnings": ", ".join(row.warnings)}
