"""Plots of runs, drawn without a display; matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featstore.runtime.extras import drawn

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_curves(epochs: dict[int, dict[str, Any]], entries: dict[str, Any], out: Path) -> None:
    """Write ``loss.png``: :func:`draw_curves`.

    Args:
        epochs: Contents of ``eval_epoch_<n>.json`` by epoch.
        entries: ``pairs`` of ``metrics.json``.
        out: Directory; ``loss.png`` is written where there are at least two epochs, and matplotlib.
    """
    if len(epochs) >= 2 and drawn("the curves", "matplotlib"):
        from featstore.runtime.drawing import save_figure

        save_figure(draw_curves(epochs, entries), out / "loss.png", dpi=120)


def draw_curves(epochs: dict[int, dict[str, Any]], entries: dict[str, Any]) -> Figure:
    """Draw validation loss over epochs, with the closed-form optimum where there is one.

    Args:
        epochs: Contents of ``eval_epoch_<n>.json`` by epoch.
        entries: ``pairs`` of ``metrics.json``.
    """
    from featstore.runtime.drawing import Drawing

    figure = Drawing(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for key, entry in entries.items():
        at = [n for n in sorted(epochs) if key in epochs[n]["pairs"]]
        line = axes.plot(at, [epochs[n]["pairs"][key]["val_loss"] for n in at], marker="o", label=key)[0]
        closed = (entry["baselines"].get("closed_form") or {}).get("r2")
        if closed is not None:
            axes.axhline(1 - closed, color=line.get_color(), linestyle=":", linewidth=1)
    axes.set_xlabel("epoch (0: before training)")
    axes.set_ylabel("validation MSE / MSE of the mean")
    axes.set_title("dotted: closed-form optimum on test", fontsize="small")
    axes.legend(fontsize="small")
    return figure


def plot_rate_distortion(points: Sequence[Mapping[str, Any]], out: Path) -> list[str]:
    """Write ``rate_distortion.png``: :func:`draw_rate_distortion`.

    Args:
        points: ``rate_distortion`` of :func:`align.sweeps.compare.compare_runs`, each with its ``pair``.
        out: Directory.

    Returns:
        Names of the files written: ``rate_distortion.png`` where there are at least two rates, and
        matplotlib; else none.
    """
    if len({point["bytes_per_text_byte"] for point in points}) < 2 or not drawn("the curves of rates", "matplotlib"):
        return []
    from featstore.runtime.drawing import save_figure

    save_figure(draw_rate_distortion(points), out / "rate_distortion.png", dpi=120)
    return ["rate_distortion.png"]


def draw_rate_distortion(points: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw R2 against rate of compressed runs, beside the codecs of the same rate.

    Args:
        points: ``rate_distortion`` of :func:`align.sweeps.compare.compare_runs`, each with its ``pair``.
    """
    from featstore.runtime.drawing import Drawing

    figure = Drawing(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for colour, pair in enumerate(dict.fromkeys(point["pair"] for point in points)):
        of_pair = sorted((p for p in points if p["pair"] == pair), key=lambda p: p["bytes_per_text_byte"])
        for name, style in (("compress", "-"), ("pca", "--"), ("strided", ":")):
            known = [p for p in of_pair if p["r2"].get(name) is not None]
            rates, values = [p["bytes_per_text_byte"] for p in known], [p["r2"][name] for p in known]
            axes.plot(rates, values, style, marker="o", markersize=4, color=f"C{colour}", label=f"{pair} {name}")
        for point in of_pair:
            if point["r2"].get("compress") is not None:
                place = (point["bytes_per_text_byte"], point["r2"]["compress"])
                text = f"{point['latents']}x{point['latent_dim']}"
                axes.annotate(text, place, xytext=(0, 6), textcoords="offset points", ha="center", fontsize="x-small")
    ids = [p["token_id_bytes"] / p["text_bytes"] for p in points]
    for x, text in ((1.0, "the text itself"), (sum(ids) / len(ids), "its token ids")):
        axes.axvline(x, color="grey", linewidth=1)
        axes.annotate(
            text, (x, 0.98), xycoords=("data", "axes fraction"), rotation=90, ha="right", va="top", fontsize="x-small"
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("bytes of latents per byte of text")
    axes.set_ylabel("R2 on test, all paired positions")
    axes.legend(fontsize="x-small")
    return figure
