"""What a verdict forbids: one line each, naming the test, the layer and the figure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from featstore.errors import ProbeError
from featstore.models.verdict import Verdict


def refuse_storing(name: str, verdict: Verdict, *, table: bool) -> None:
    """Refuse an extraction whose rows would not be what they are taken for.

    Args:
        name: The model's name.
        verdict: With ``reading``.
        table: Whether layer 0 is to be a table.

    Raises:
        ProbeError: Layer 0 is to be a table and depends on more than the token.
    """
    reading = verdict.reading
    if table and reading is not None and not reading.layer_0_is_table:
        raise ProbeError(
            f"--layer-0 table: layer 0 of model {name!r} depends on the position, not on the token alone (one id "
            f"at two positions differs by {_figure(reading.layer_0)}); leave --layer-0 out, which stores its rows"
        )


def refuse_injecting(
    name: str,
    verdict: Verdict,
    layers: Sequence[int],
    *,
    allow_side_channel: bool = False,
    remedy: str = "choose other --layers, or type --allow-side-channel to have the leak beside every figure",
) -> None:
    """Refuse to inject where figures would not be about the injected states.

    Args:
        name: The model's name.
        verdict: With these layers.
        layers: Where states are to be put in.
        allow_side_channel: The user has typed that a leak is known and wanted.
        remedy: What to do about a leak.

    Raises:
        ProbeError: The message names the test, the layer and the figure.
    """
    reading = verdict.reading
    if reading is not None and reading.causal is False:
        raise ProbeError(
            f"model {name!r} reads ahead (causality test: states change by {_figure(reading.future)} of their norm "
            "when only later tokens change); states that know the text after them cannot be injected"
        )
    for layer in layers:
        entry = verdict.layers[str(layer)]
        if not entry.self_identical:
            raise ProbeError(
                f"model {name!r}, layer {layer}: self-injection changes the logits; states cannot be put in there; "
                "choose other --layers"
            )
        if entry.leak != 0 and not allow_side_channel:
            raise ProbeError(
                f"model {name!r}, layer {layer}: the swap test leaks {_figure(entry.leak)} (later blocks learn of the "
                f"text past the residual stream), so figures would not be about the injected states; {remedy}"
            )


def refuse_hiding(name: str, verdict: Verdict, layers: Sequence[int]) -> None:
    """Refuse to hide where the prompt stays visible.

    Args:
        name: The model's name.
        verdict: With these layers, tested for hiding.
        layers: Where states are to be put in.

    Raises:
        ProbeError: The message names the test, the layer and what was seen.
    """
    for layer in layers:
        refused = verdict.layers[str(layer)].hide_refused
        if refused is not None:
            raise ProbeError(
                f"model {name!r}, layer {layer}: --keep hide fails the two-prompt test: {refused}; use --keep own"
            )


def refuse_continuing(name: str, verdict: Verdict) -> None:
    """Refuse to generate where no way to go on from a prompt says what one pass over the whole text says.

    Args:
        name: The model's name.
        verdict: With ``continuing``.

    Raises:
        ProbeError: There is none.
    """
    if verdict.continuing is not None and verdict.continuing.kind == "none":
        raise ProbeError(
            f"model {name!r}: neither from a cache nor without one does a continued text get the logits of one pass; "
            "text cannot be generated with this model here"
        )


def _figure(value: float | None) -> str:
    return "NaN" if value is None or not math.isfinite(value) else f"{value:.2g}"
