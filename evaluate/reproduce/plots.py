"""The programme's three plots: what works by depth, what rank buys, and accuracy and loss against rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from evaluate.reproduce.answers.maps import both, ranks_of
from evaluate.reproduce.answers.models import accuracy_of, compressed_runs, task_rate
from evaluate.reproduce.evidence import Evidence, Value
from featstore.runtime.drawing import save_figure

_DPI = 120
#: Between bars of one depth, as a share of the depth.
_ASIDE = 0.006


def draw_all(evidence: Evidence, out: Path) -> list[str]:
    """Draw what there is evidence for.

    Args:
        evidence: Of the programme.
        out: Directory of the PNG files.

    Returns:
        Names of the files written.
    """
    figures = {"layers.png": _layers(evidence), "ranks.png": _ranks(evidence), "rates.png": _rates(evidence)}
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    for name, figure in drawn.items():
        save_figure(figure, out / name, dpi=_DPI)
    return list(drawn)


def _line(axes: Any, points: Sequence[tuple[float, Value | None]], label: str, **style: Any) -> None:
    known = [(x, value) for x, value in points if value is not None]
    if not known:
        return
    values = [value.value for _, value in known]
    ends = [(v.low, v.high) if v.low is not None and v.high is not None else (v.value, v.value) for _, v in known]
    # A percentile interval may leave its own estimate out by a hair; a bar cannot be negative.
    bars = [
        [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)],
        [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)],
    ]
    axes.errorbar([x for x, _ in known], values, yerr=bars, marker="o", markersize=4, capsize=2, label=label, **style)


def _legend(axes: Any) -> None:
    # Where no figure could be had there is nothing to name, and matplotlib objects.
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="x-small")


def _layers(evidence: Evidence) -> Figure | None:
    places = evidence.places
    if not evidence.pairs("affine"):
        return None
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    half = len(places.pairs)
    for colour, pairs in enumerate((both(places)[:half], both(places)[half:])):
        way = f"{pairs[0].source} → {pairs[0].target}"
        depths = [places.depth_of(pair.source, pair.source_layer) for pair in pairs]
        for place, (run, style) in enumerate((("procrustes", ":"), ("lora", "--"), ("affine", "-"))):
            values: Mapping[str, Any] = {pair.key: evidence.test(run, pair.key) for pair in pairs}
            # Side by side, so that bars at one depth can be told apart.
            aside = _ASIDE * (2 * place + colour - 2.5)
            points = [(depth + aside, values[pair.key]) for depth, pair in zip(depths, pairs, strict=True)]
            _line(left, points, f"{run}, {way}", linestyle=style, color=f"C{colour}")
        against = [evidence.beyond_token("affine", pair.key) for pair in pairs]
        _line(right, list(zip(depths, against, strict=True)), f"affine, {way}", color=f"C{colour}")
    left.set(xlabel="depth of the source layer", ylabel="R2 on test documents")
    right.set(xlabel="depth of the source layer", ylabel="nats per token below the token alone")
    right.axhline(0, color="grey", linewidth=1)
    for axes in (left, right):
        axes.xaxis.set_major_formatter(lambda depth, _: f"{depth:.0%}")
        _legend(axes)
    return figure


def _ranks(evidence: Evidence) -> Figure | None:
    ranks = ranks_of(evidence)
    if len(ranks) < 2:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for colour, pair in enumerate(evidence.places.inner):
        for suffix, style, name in (("", "-", "rank alone"), ("-on-procrustes", "--", "on Procrustes")):
            points = [(float(rank), evidence.test(f"rank-{rank}{suffix}", pair.key)) for rank in ranks]
            _line(axes, points, f"{pair.key} {name}", linestyle=style, color=f"C{colour}")
        whole = evidence.test("affine", pair.key)
        if whole is not None:
            axes.axhline(whole.value, color=f"C{colour}", linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="rank (dotted: affine)", ylabel="R2 on test documents")
    _legend(axes)
    return figure


def _rates(evidence: Evidence) -> Figure | None:
    runs = compressed_runs(evidence)
    found = [
        (point.bytes_per_text_byte, run, key)
        for run in runs
        for key, entry in evidence.pairs(run).items()
        if (point := entry.rate_distortion) is not None and point.bytes_per_text_byte is not None
    ]
    if len(found) < 2:
        return None
    found.sort()
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _line(left, [(rate, evidence.test(run, key)) for rate, run, key in found], "R2")
    _line(left, [(rate, evidence.recovered(run, key)) for rate, run, key in found], "stitched loss recovered")
    for condition in ("aligned", "aligned_random", "aligned_shuffled"):
        points = [
            (rate, accuracy_of(evidence, run, key, condition))
            for _, run, key in found
            if (rate := task_rate(evidence, run, key)) is not None
        ]
        _line(right, points, condition)
    for condition, style in (("text", "--"), ("silent", ":")):
        value = next((v for _, run, key in found if (v := accuracy_of(evidence, run, key, condition))), None)
        if value is not None:
            right.axhline(value.value, color="grey", linestyle=style, linewidth=1, label=condition)
    left.set(xlabel="bytes of latents per byte of text", ylabel="share on test windows")
    right.set(xlabel="bytes of latents per byte of text", ylabel="questions answered rightly")
    told = {rate for _, run, key in found if (rate := task_rate(evidence, run, key)) is not None}
    for axes, rates in ((left, {rate for rate, _, _ in found}), (right, told)):
        axes.set_xscale("log")
        axes.set_xticks(sorted({1.0, *rates}), labels=[f"{rate:.3g}" for rate in sorted({1.0, *rates})])
        axes.minorticks_off()
        axes.axvline(1.0, color="grey", linewidth=1)
        axes.annotate(
            "the text itself", (1.0, 0.02), xycoords=("data", "axes fraction"), rotation=90, fontsize="x-small"
        )
        _legend(axes)
    return figure
