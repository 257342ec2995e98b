"""Parameters of which the quick tier takes some."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def tiered(quick: Iterable[Any], thorough: Iterable[Any]) -> list[Any]:
    """Values for `parametrize`: those of every tier, then those that the quick tier leaves out.

    Where there are several arguments, a value is a tuple of them.
    """
    marked = (value if isinstance(value, tuple) else (value,) for value in thorough)
    return [*quick, *(pytest.param(*value, marks=pytest.mark.thorough) for value in marked)]
