"""A trained resampler beside its baselines at the same rate, and the table of several rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from align.compress.baselines import fit_baselines
from align.compress.rate import rate_card, rate_of
from align.compress.score import Codec, Trained, score_windows
from align.compress.windows import Windows
from align.metrics import DocumentSums, Figures, Reasons

if TYPE_CHECKING:
    from align.compress.fit import Compressed

#: What is compared, in order.
NAMES = ("compress", "pca", "strided")


def evaluate(
    trained: Compressed,
    train: Windows,
    val: Windows,
    test: Windows,
    *,
    seed: int = 0,
    documents: DocumentSums | None = None,
    more: Mapping[str, Codec] | None = None,
) -> dict[str, Any]:
    """Test figures of a resampler and its baselines, and what they cost.

    Args:
        trained: What was trained.
        train: Train windows; the baselines are fitted on them.
        val: Validation windows; the baselines' ridge strengths are chosen on them.
        test: Test windows.
        seed: Of the retrieval gallery and the CKA subset.
        documents: Takes squared errors by document as well, under the names of :data:`NAMES` and ``more``.
        more: What else to score at the same positions; it is at no rate of the latents, and in no table of rates.

    Returns:
        ``{"figures": {name: figures}, "reasons": {name: reasons}, "rate": ..., "rate_distortion": ...}`` with the
        names of :data:`NAMES` and ``more``; figures are those of the linear maps with ``all_positions``.
        ``rate_distortion`` is an entry of :func:`table`.
    """
    layout = trained.module.layout
    tensors = trained.module.export()
    codecs: dict[str, Codec] = {
        "compress": Trained(trained.module),
        **fit_baselines(
            train,
            val,
            layout.latents,
            layout.latent_dim,
            tensors["resampler.basis"],
            tensors["resampler.mean_source"],
        ),
        **(more or {}),
    }
    scored = score_windows(test, codecs, trained.mean_target, seed=seed, documents=documents)
    figures: dict[str, Figures] = {name: found for name, (found, _) in scored.items()}
    reasons: dict[str, Reasons] = {name: why for name, (_, why) in scored.items()}
    card = rate_card(rate_of(test, layout.latents, layout.latent_dim))
    return {
        "figures": figures,
        "reasons": reasons,
        "rate": card,
        "rate_distortion": rate_distortion(layout.latents, layout.latent_dim, card, figures),
    }


def rate_distortion(
    latents: int, latent_dim: int, card: Mapping[str, float], figures: Mapping[str, Figures]
) -> dict[str, Any]:
    """One point of the rate-distortion table; JSON.

    Args:
        latents: M.
        latent_dim: R.
        card: From :func:`align.compress.rate.rate_card`.
        figures: Test figures by name.
    """
    return {
        "latents": latents,
        "latent_dim": latent_dim,
        "bytes_per_window": card["latent_bytes"],
        "bytes_per_text_byte": card["latent_bytes_per_text_byte"],
        **{name: card[name] for name in ("text_bytes", "token_id_bytes", "raw_bytes", "side_bytes")},
        "r2": {name: figures[name]["r2"] for name in NAMES if name in figures},
    }


def table(points: Sequence[Mapping[str, Any]]) -> str:
    """The rate-distortion table for people, the cheapest first.

    Args:
        points: From :func:`rate_distortion`; each is a mean over its own test windows.
    """
    names = list(dict.fromkeys(name for point in points for name in point["r2"]))
    heads = "".join(f" {name:>9}" for name in names)
    lines = [f"{'latents':>9} {'bytes/window':>12} {'per text byte':>13}{heads}   (R2 on test, paired positions)"]
    for point in sorted(points, key=lambda p: (p["bytes_per_window"], p["latents"])):
        shape = f"{point['latents']}x{point['latent_dim']}"
        values = "".join(_cell(point["r2"].get(name)) for name in names)
        lines.append(f"{shape:>9} {point['bytes_per_window']:12,.0f} {point['bytes_per_text_byte']:13.2f}{values}")
    return "\n".join([*lines, *dict.fromkeys(_others(point) for point in points)])


def _cell(value: float | None) -> str:
    return f" {'-':>9}" if value is None else f" {value:9.3f}"


def _others(point: Mapping[str, Any]) -> str:
    return (
        f"a window's text is {point['text_bytes']:,.0f} bytes, its token ids {point['token_id_bytes']:,.0f}, "
        f"its states {point['raw_bytes']:,.0f}; "
        f"beside the latents the receiver needs {point['side_bytes']:,.0f} bytes of positions"
    )
