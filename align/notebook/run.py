"""A run directory as an object: what was measured, the maps, the epochs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from align.maps.fitted import load_adapter
from align.metrics import TOKEN
from align.notebook.maps import Maps
from align.results import Baseline, EpochRecord, Metrics, PairMetrics, read_epochs, read_metrics
from align.settings import Settings, load_settings
from featstore.errors import SpecError
from featstore.runtime.arguments import as_path
from featstore.runtime.extras import extras_named
from featstore.runtime.sheets import Sheet, counted, number, with_interval
from featstore.text.roles import of_roles

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from rich.console import RenderableType

    from featstore.runtime.drawing import Point

#: Baseline that is the optimum of a class of maps, and no control.
_CLOSED = "closed_form"
#: Baselines that are no controls: the optimum, and what the source's token alone says.
_NO_CONTROLS = (_CLOSED, TOKEN)
PLOTS = ("scores", "curves")
#: Least R2 that a panel of scores shows.
_LOWEST = -1.5


class Run:
    """A run of `align train`, read when it is asked for.

    A run is a path, too: whatever takes a run directory takes a run.

    Attributes:
        path: Run directory.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Name a run directory; nothing is read yet.

        Args:
            path: The directory.

        Raises:
            SpecError: Not a path.
        """
        self.path = as_path("run", path)

    @cached_property
    def metrics(self) -> Metrics:
        """What was measured: ``run.metrics.pairs["a:1->b:1"].test.r2``.

        Raises:
            AdapterError: There is no finished run.
            CorruptDataError: ``metrics.json`` is damaged.
        """
        return read_metrics(self.path)

    @cached_property
    def maps(self) -> Maps:
        """The fitted maps by key.

        Raises:
            AdapterError: There is no finished run, or it is damaged.
        """
        return Maps(load_adapter(self.path))

    @cached_property
    def settings(self) -> Settings:
        """What the run was told.

        Raises:
            SpecError: There is no usable ``run.yaml``.
        """
        return load_settings(self.path / "run.yaml")

    @cached_property
    def epochs(self) -> tuple[EpochRecord, ...]:
        """Figures on validation rows after every epoch; of a closed form the one of its fit.

        Raises:
            AdapterError: There is no such directory.
            CorruptDataError: A file of them is damaged.
        """
        return read_epochs(self.path)

    def to_pandas(self) -> pd.DataFrame:
        """One row for every layer pair and set of figures; see :meth:`align.results.Metrics.to_pandas`.

        Raises:
            AdapterError: There is no finished run.
        """
        return self.metrics.to_pandas()

    @extras_named()
    def plot(self, kind: str | None = None) -> Figure:
        """Draw the run.

        Args:
            kind: ``scores``: R2 on test rows with its interval, beside baselines and controls, a panel for each layer
                pair. ``curves``: validation loss over epochs. None: curves where there are at least two epochs.

        Raises:
            AdapterError: There is no finished run.
            SpecError: Another kind, or curves of a run without epochs.
        """
        kind = kind or ("curves" if len(self.epochs) > 1 else "scores")
        if kind not in PLOTS:
            raise SpecError(f"plot {kind!r}: choose one of {', '.join(PLOTS)}")
        if kind == "scores":
            return self._scores()
        if len(self.epochs) < 2:
            raise SpecError(f"{self.path} was not trained over epochs, so there are no curves; plot 'scores'")
        # Only here: matplotlib takes half a second to import.
        from align.runs.plots import draw_curves

        pairs = {key: pair.content() for key, pair in self.metrics.pairs.items()}
        return draw_curves({record.epoch: record.content() for record in self.epochs}, pairs)

    def __fspath__(self) -> str:
        return str(self.path)

    def __rich__(self) -> RenderableType:
        """The figures on test rows for a terminal."""
        return self._sheet().__rich__() if self._finished() else repr(self)

    def __repr__(self) -> str:
        """One line."""
        if not self._finished():
            return f"<Run {str(self.path)!r}: not finished>"
        tests = [pair.test for pair in self.metrics.pairs.values()]
        beyond = _range([test.partial_r2 for test in tests])
        left = f", {beyond} beyond the token" if beyond else ""
        return (
            f"<Run {str(self.path)!r}: {self._what()}, R2 {_range([test.r2 for test in tests]) or 'undefined'}{left}>"
        )

    def _repr_html_(self) -> str:
        from html import escape

        return self._sheet().html() if self._finished() else f"<code>{escape(repr(self))}</code>"

    def _finished(self) -> bool:
        return (self.path / Metrics.file).is_file()

    def _what(self) -> str:
        return f"{self.metrics.type}, {counted(len(self.metrics.pairs), 'map')}"

    def _sheet(self) -> Sheet:
        rows, notes = [], []
        for key, pair in self.metrics.pairs.items():
            best = best_control(pair)
            closed, token = pair.baselines.get(_CLOSED), pair.baselines.get(TOKEN)
            rows.append(
                (
                    key,
                    with_interval(pair.test.partial_r2, pair.test.partial_r2_ci95),
                    with_interval(pair.test.r2, pair.test.r2_ci95),
                    number(token.r2 if token else None),
                    number(closed.r2 if closed else None),
                    number(best[1] if best else None) + (f" {best[0]}" if best else ""),
                    number(pair.test.cosine_centered),
                    number(pair.test.retrieval_top1),
                    number(pair.test.retrieval_same_token_top1),
                    str(pair.test.n),
                )
            )
            notes += [f"{key}: {found.level}: {found.sentence}" for found in pair.warnings]
        columns = (
            "map",
            "beyond the token [95 %]",
            "R2 [95 %]",
            "token alone",
            "optimum",
            "best control",
            "cosine, centred",
            "retrieval top-1",
            "among the same token",
            "test rows",
        )
        return Sheet(f"{self._what()}{of_roles(self.metrics.roles)} in {self.path}", columns, tuple(rows), tuple(notes))

    def _scores(self) -> Figure:
        from featstore.runtime.drawing import draw_points, panels

        figure, axes = panels(list(self.metrics.pairs))
        for panel, pair in zip(axes, self.metrics.pairs.values(), strict=True):
            baselines = {name: block for name, block in pair.baselines.items() if block is not None}
            known = [pair.test, *baselines.values()]
            # Controls can be so far below zero that nothing else could be told apart: their figure stands in the label.
            lowest = min([max(float(block.r2), _LOWEST) for block in known if block.r2 is not None], default=0.0)
            points: list[Point] = [(self.metrics.type, pair.test.r2, pair.test.r2_ci95)]
            points += [(_label(name, block), block.r2, block.r2_ci95) for name, block in baselines.items()]
            controls = [_label(name, block) for name, block in baselines.items() if name != _CLOSED]
            draw_points(panel, points, controls=controls)
            panel.set_xlim(min(lowest, 0.0) - 0.05, 1.05)
            panel.axvline(0, color="grey", linewidth=1, linestyle=":")
            panel.set_xlabel("R2 on test rows; dotted: the mean")
        return figure


def _range(values: Sequence[float | None]) -> str:
    """The least and the greatest of some figures; empty without any."""
    known = [value for value in values if value is not None]
    return " to ".join(dict.fromkeys(f"{value:.3f}" for value in (min(known), max(known)))) if known else ""


def _label(name: str, block: Baseline) -> str:
    return f"{name} {block.r2:.3g}" if block.r2 is not None and block.r2 < _LOWEST else name


def best_control(pair: PairMetrics) -> tuple[str, float] | None:
    """Name and test R2 of the best control; None without one.

    Args:
        pair: What was measured.
    """
    known = {
        name: float(block.r2)
        for name, block in pair.baselines.items()
        if name not in _NO_CONTROLS and block is not None and block.r2 is not None
    }
    best = max(known, key=lambda name: known[name], default=None)
    return None if best is None else (best, known[best])
