"""What stands beside figures from injected states: which tests the models passed, what leaks, which start token.

The swap test runs one text with the whole stream of another. Where the logits are not the other's, later blocks learn
of the text past the stream, and a figure from injected states is not about those states alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from align.judging.findings import Finding, finding

if TYPE_CHECKING:
    from evaluate.injection.loading import Loaded
    from featstore.models.probe.prove import Needs

#: The code of the finding about a leak.
SIDE_CHANNEL = "side-channel"
#: What a leak is, wherever it is told to people.
_MEANS = "later blocks also learn of the text past the stream"


def recorded(loaded: Loaded, needs: Needs) -> dict[str, Any]:
    """What was tested on a model for a command, for ``verified`` of a result.

    Args:
        loaded: The model, tested.
        needs: What the command does with it.
    """
    from featstore.models.probe.prove import asked

    return asked(loaded.verdict, needs).content()


def leak_at(verified: Mapping[str, Any], model: str, layer: int) -> float | None:
    """What the swap test found; None where it is no finite number.

    Args:
        verified: By model, from :func:`recorded`.
        model: Name.
        layer: 0..L of it.
    """
    leak: float | None = verified[model]["layers"][str(layer)]["leak"]
    return leak


def start_token(loaded: Loaded) -> dict[str, Any]:
    """The token that stands for the first one of a hidden prompt, for ``start`` of a result.

    Args:
        loaded: The model that takes states.
    """
    token = loaded.info.tokenizer.convert_ids_to_tokens(loaded.stream.start)
    return {"id": loaded.stream.start, "token": None if token is None else str(token)}


def side_channels(leaks: Mapping[str, float | None]) -> list[Finding]:
    """What a careful reader would object to: a finding for every layer pair whose target layer leaks.

    Args:
        leaks: By layer pair.
    """
    return [finding(SIDE_CHANNEL, {"pair": key}, leak=leak) for key, leak in leaks.items() if leak != 0]


def leak_figure(leak: float | None) -> str:
    """A leak in two digits.

    Args:
        leak: None where it is no finite number.
    """
    return "without bound" if leak is None else f"{leak:.2g}"


def leak_mark(leak: float | None, *, known: bool = True) -> str:
    """What stands behind a figure where the target's layer leaks; nothing where it does not.

    Args:
        leak: Of the layer pair.
        known: Whether it was tested; results of earlier versions were not.
    """
    return f"leak {leak_figure(leak)}" if known and leak != 0 else ""


def leak_words(leak: float | None, *, known: bool = True) -> str:
    """The same with what it means.

    Args:
        leak: Of the layer pair.
        known: As of :func:`leak_mark`.
    """
    mark = leak_mark(leak, known=known)
    return f"{mark}: {_MEANS}" if mark else ""
