"""How a number is shown: enough digits, its origin; where there is none, a dash and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import LiteralString

from markupsafe import Markup

from evaluate.reporting.reading.inputs import Node

Style = Callable[[float], str]

#: float32 sums leave this much where the answer is zero; hovering still shows it.
_NOISE = 1e-6


def fixed(value: float, decimals: int) -> str:
    """Write with fixed decimals, and more where rounding would claim an exact 0, 1 or -1.

    Args:
        value: Any finite number.
        decimals: Digits after the point.
    """
    if abs(value) < _NOISE:
        value = 0.0
    if abs(value) >= 1e5:
        return _typeset(f"{value:.1e}")
    for digits in range(decimals, decimals + 4):
        text = f"{value:,.{digits}f}"
        if float(text.replace(",", "")) not in (0.0, 1.0, -1.0) or float(text) == value:
            return _typeset(text)
    return _typeset(f"{value:,.{decimals}f}")


def score(value: float) -> str:
    """Write R2, CKA or a cosine: three decimals.

    Args:
        value: The figure.
    """
    return fixed(value, 3)


def nats(value: float) -> str:
    """Write a loss in nats a token or bits a byte: two decimals.

    Args:
        value: The loss.
    """
    return fixed(value, 2)


def percent_number(value: float) -> str:
    """Write a share in percent without the sign, with more digits where it would claim 0 or 100.

    Args:
        value: The share, 1 for all.
    """
    if abs(value) < _NOISE:
        value = 0.0
    if abs(value) >= 1e3:
        return _typeset(f"{100 * value:.1e}")
    for digits in range(5):
        text = f"{100 * value:,.{digits}f}"
        if float(text.replace(",", "")) not in (0.0, 100.0, -100.0) or value in (0.0, 1.0, -1.0):
            return _typeset(text)
    return _typeset(f"{100 * value:,.0f}")


def percent(value: float) -> str:
    """Write a share in percent.

    Args:
        value: The share, 1 for all.
    """
    return percent_number(value) + "\u202f%"


def count(value: float) -> str:
    """Write a whole number with separators.

    Args:
        value: The number.
    """
    return _typeset(f"{value:,.0f}" if float(value).is_integer() else f"{value:,.2f}")


def exact(value: float) -> str:
    """Write all digits that matter, for hovering and for tables that are copied from.

    Args:
        value: Any finite number.
    """
    return _typeset(f"{value:.6g}")


def show(node: Node, style: Style = score, reason: str = "") -> Markup:
    """Render a figure with its full value and origin, linked to its file, or a dash that says why there is none.

    Args:
        node: The figure.
        style: How to write it.
        reason: Why it is missing, shown if it is.
    """
    if node.number is None:
        return dash(reason or f"not given in {node.at.partition('#')[0]}")
    # The page's script says both in words to whoever points at it.
    figure = Markup('<data value="{}" data-from="{}">{}</data>').format(node.value, node.at, style(node.number))
    # Not a stop for the Tab key: a page has hundreds, and the files are linked once below each table and plot.
    return Markup('<a class="n" href="{}" tabindex="-1">{}</a>').format(node.href, figure) if node.href else figure


def dash(reason: str) -> Markup:
    """Render a missing figure.

    Args:
        reason: Why it is missing.
    """
    return Markup('<span class="none" title="{}">–</span>').format(reason)


def say(template: LiteralString, *parts: object) -> Markup:
    """Fill a sentence: the template is markup, the parts are escaped unless they are markup too.

    Args:
        template: Written in this package, never read from a file.
        parts: One for each ``{}``.
    """
    return Markup(template).format(*parts)  # noqa: S704 - the type says where templates come from


def interval(node: Node, style: Style = nats) -> Markup:
    """Render a confidence interval ``[low, high]``; nothing if an end is missing.

    Args:
        node: A list of two numbers.
        style: How to write each end.
    """
    if node.get(0).number is None or node.get(1).number is None:
        return Markup("")
    ends = (show(node.get(0), style), show(node.get(1), style))
    return Markup('<span class="ci">[{}, {}]</span>').format(*ends)


def _typeset(text: str) -> str:
    return text.replace("-", "\u2212")
