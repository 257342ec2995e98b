"""How runs, conditions and shares are called, wherever the page speaks of them."""

from __future__ import annotations

from markupsafe import Markup

from align.maps.registry import map_types
from evaluate.reporting.reading.inputs import Node, Run
from evaluate.reporting.reading.numbers import interval, percent, percent_number, say, show


def type_name(run: Run) -> str:
    """The aligner's type as a word that can open a sentence.

    Args:
        run: The run.
    """
    titles = {type_.name: type_.title for type_ in map_types()}
    return titles.get(run.type) or run.type.capitalize() or "The map"


def share(block: Node) -> Markup:
    """A recovered share with its interval, ``85 % [82, 88]``.

    Args:
        block: With ``value`` and ``ci95``.
    """
    ends = interval(block.get("ci95"), percent_number)
    return say("{} {}" if ends else "{}{}", show(block.get("value"), percent), ends)


def control_name(name: str) -> str:
    """A control's or condition's name for people.

    Args:
        name: As in the files, for instance ``random_norm``.
    """
    return "PCA" if name == "pca" else name.replace("_", " ").replace("->", " → ")
