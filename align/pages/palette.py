"""The colours that stand for similarity, on the page and in the pictures beside it.

The colours are those of the final report. Their places are such that equal steps of similarity are about equal steps
in CIELAB, so that no value draws the eye to a border that the numbers do not have. Below 0, or below a floor, the
colour turns to rust.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

RGB = tuple[int, int, int]
Stops = tuple[tuple[float, RGB], ...]

#: From unlike to alike.
ALIKE: Stops = (
    (0.0, (244, 243, 236)),
    (0.089, (222, 229, 204)),
    (0.23, (158, 205, 182)),
    (0.467, (62, 151, 166)),
    (0.755, (38, 92, 148)),
    (1.0, (32, 28, 92)),
)
#: From 0, or the floor, downwards.
BELOW: Stops = ((0.0, (244, 243, 236)), (1.0, (168, 66, 24)))


@dataclass(frozen=True)
class Scale:
    """Which values the two ends of the colours stand for; every value lies within, nothing is clamped.

    Attributes:
        low: The lowest value; 0 or less where higher is closer.
        high: The highest value.
        closer: Whether similar layers get higher or lower values.
    """

    low: float
    high: float
    closer: Literal["higher", "lower"]

    @classmethod
    def over(
        cls,
        values: Iterable[float | None],
        *,
        closer: Literal["higher", "lower"] = "higher",
        bounds: tuple[float | None, float | None] = (None, 1.0),
    ) -> Scale:
        """The scale from 0 to the measure's upper bound, widened to hold every value.

        Args:
            values: All values that share the scale; None is left out.
            closer: Whether similar layers get higher or lower values.
            bounds: What the measure can take in principle, None for an open side.
        """
        found = [v for v in values if v is not None]
        top = bounds[1] if bounds[1] is not None else max(found, default=1.0)
        high = max([top, *found])
        # Distances that are all zero still need a scale of some length.
        return cls(min([0.0, *found]), high if high > 0 else 1.0, closer)

    def share(self, value: float) -> float:
        """How far a value lies on the way from unlike (0) to alike (1); negative below 0.

        Args:
            value: A number within the scale.
        """
        if self.closer == "lower":
            return (self.high - value) / (self.high - self.low)
        # Below 0 the step of colour is the same as above, unless the values would leave the scale.
        return value / self.high if value >= 0 else value / max(self.high, -self.low)

    def rgb(self, value: float) -> RGB:
        """The colour of a value.

        Args:
            value: A number within the scale.
        """
        return colour(self.share(value))

    def words(self) -> str:
        """The scale in words, for a caption."""
        direction = "darker is more alike" + (" (lower values)" if self.closer == "lower" else "")
        below = ", rust below 0" if self.closer == "higher" and self.low < 0 else ""
        return f"{self.low:.3g} to {self.high:.3g}, {direction}{below}"

    def to_dict(self) -> dict[str, Any]:
        """The scale as the page's script reads it."""
        return {"low": self.low, "high": self.high, "closer": self.closer}


def colour(share: float) -> RGB:
    """The colour of a share of the way from unlike to alike.

    Args:
        share: From -1 to 1; beyond, the colour of the end.
    """
    stops = ALIKE if share >= 0 else BELOW
    at = min(abs(share), 1.0)
    for (x0, c0), (x1, c1) in itertools.pairwise(stops):
        if at <= x1:
            t = (at - x0) / (x1 - x0)
            red, green, blue = (round(a + t * (b - a)) for a, b in zip(c0, c1, strict=True))
            return red, green, blue
    return stops[-1][1]


def is_dark(rgb: RGB) -> bool:
    """Whether white text reads better on a colour than black, by WCAG 2.2 relative luminance.

    Args:
        rgb: 0 to 255 each.
    """
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # The contrast to white equals the contrast to black where (L + 0.05)^2 = 1.05 x 0.05.
    return luminance < 0.179
