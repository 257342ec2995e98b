"""Amounts as typed, parsed into numbers: token budgets and bytes.

Every ``parse_*`` function raises a :class:`~featstore.errors.SpecError` that quotes the value and says what is right.
"""

from __future__ import annotations

import re
from decimal import Decimal

from featstore.errors import SpecError

_BUDGET = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kKmMgGbB]?)\Z")
_BYTES = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kKmMgGtT]?)(i?[bB]|)\Z")


def parse_budget(text: str) -> int | None:
    """Parse a token budget: ``1000000``, ``1M``, ``200k`` or ``all``.

    Args:
        text: As typed after ``--max-tokens``.

    Returns:
        The number of tokens, or None for ``all``.

    Raises:
        SpecError: Not a positive number.
    """
    if text == "all":
        return None
    match = _BUDGET.match(text)
    factor = {"": 1, "k": 1_000, "m": 1_000_000, "g": 1_000_000_000, "b": 1_000_000_000}
    # Decimal: in binary floating point 1.001k is 1000.9999 tokens.
    value = int(Decimal(match[1]) * factor[match[2].lower()]) if match else 0
    if value < 1:
        raise SpecError(f"token budget {text!r}: give a positive number such as 200000, 200k or 1M, or 'all'")
    return value


def parse_bytes(text: str) -> int:
    """Parse an amount of memory: ``500000000``, ``500M``, ``12G``.

    Args:
        text: As typed.

    Returns:
        Bytes; k, M, G and T are powers of 1000, with an optional B or iB (powers of 1024).

    Raises:
        SpecError: Not a positive amount.
    """
    match = _BYTES.match(text)
    value = 0
    if match:
        base = 1024 if match[3].lower() == "ib" else 1000
        value = int(Decimal(match[1]) * base ** " kmgt".index(match[2].lower() or " "))
    if value < 1:
        raise SpecError(f"amount of memory {text!r}: give a positive number of bytes, or such as 500M or 12G")
    return value
