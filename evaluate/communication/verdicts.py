"""Figures of right and wrong answers, what a careful reader would object to, and the table for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.metrics import document_bootstrap
from evaluate.injection.verified import leak_mark, leak_words
from featstore.runtime.console import human_bytes

METHODS = ("replace", "sum", "mean", "aligned")
CONTROLS = ("random", "shuffled")
#: Below it an interval of an accuracy near one half is wider than 0.34.
FEW = 30
_Z95 = 1.959963984540054


def condition_name(method: str, control: str | None = None) -> str:
    """What a way of putting states in, or a control of it, is called; those of ``replace`` bear the control's name.

    Args:
        method: One of :data:`METHODS`.
        control: One of :data:`CONTROLS`, None for the mapped states.
    """
    if control is None:
        return method
    return control if method == "replace" else f"{method}_{control}"


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927): it holds at 0 and 1 and for few examples.

    (p + z^2/2n -+ z sqrt(p (1-p)/n + z^2/4n^2)) / (1 + z^2/n), with p = right/n.

    Args:
        right: Right answers.
        n: Answers.
    """
    p, z2 = right / n, _Z95**2
    middle = p + z2 / (2 * n)
    half = _Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # None and all right have 0 and 1 for an end, which rounding would miss.
    low = 0.0 if right == 0 else (middle - half) / (1 + z2 / n)
    high = 1.0 if right == n else (middle + half) / (1 + z2 / n)
    return low, high


def figures(right: NDArray[np.bool_], size: float) -> dict[str, Any]:
    """Accuracy with its interval, and what was sent.

    Args:
        right: bool ``(n,)``.
        size: Mean bytes on the wire for an example.
    """
    count = int(right.sum())
    return {
        "accuracy": count / len(right),
        "ci95": list(wilson(count, len(right))),
        "right": count,
        "n": len(right),
        "bytes": size,
    }


def gain(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> dict[str, Any]:
    """How much more often the first is right on the same examples; the interval resamples examples.

    Args:
        first: bool ``(n,)``.
        second: bool ``(n,)``.
    """
    difference = first.astype(np.float64) - second.astype(np.float64)
    table = np.stack([difference, np.ones_like(difference)], axis=1)
    return {"value": float(difference.mean()), "ci95": list(document_bootstrap(table, (0, 1)))}


def warnings_of(
    right: Mapping[str, NDArray[np.bool_]], pairs: Sequence[str], chance: float, gains: Mapping[str, Any]
) -> list[dict[str, str]]:
    """What stands against reading the accuracies as communication.

    Args:
        right: By condition (``silent``, ``text``, ``summary``, and ``<condition> <pair>``) bool ``(n,)``.
        pairs: Keys of the layer pairs.
        chance: Accuracy of an answer that looks at nothing.
        gains: By mapped condition, what :func:`gain` gives against each control.
    """
    n = len(right["text"])
    text, (lowest, _) = float(right["text"].mean()), wilson(int(right["text"].sum()), n)
    found: list[dict[str, str]] = []
    if n < FEW:
        low, high = wilson(n // 2, n)
        found.append(
            _warning("few-examples", f"{n} examples: an interval is up to {high - low:.2f} wide; use {FEW} or more")
        )
    if lowest <= chance:
        found.append(
            _warning(
                "text-near-chance",
                f"the text itself gives only {text:.0%} where chance is {chance:.0%}: this model cannot do "
                "the task, so states cannot be seen to carry anything; use an easier task or a larger model",
            )
        )
    told = gain(right["text"], right["silent"])
    if not told["ci95"][0] > 0:
        found.append(
            _warning(
                "text-no-better-than-silent",
                f"with the text {text:.0%} are right, without it {right['silent'].mean():.0%}: the context "
                "makes no difference beyond its interval",
            )
        )
    for pair in pairs:
        for method in METHODS:
            # A map may lack a method: one of windows has no single states.
            against = gains.get(f"{method} {pair}", {})
            level = [c for c in CONTROLS if c in against and not against[c]["ci95"][0] > 0]
            if level:
                mapped = right[f"{method} {pair}"].mean()
                others = " and ".join(
                    f"{right[f'{condition_name(method, c)} {pair}'].mean():.0%} with {_WHAT[c]}" for c in level
                )
                found.append(
                    _warning(
                        "no-better-than-control",
                        f"{pair}, {method}: {mapped:.0%} right with mapped states, {others}: no better by more than "
                        "its interval",
                    )
                )
    return found


def undelivered(lost: Sequence[int], target: str) -> dict[str, str]:
    """What to say of summaries that did not arrive whole.

    Args:
        lost: By example how many characters the target's tokenizer cannot spell; some at least.
        target: The target's name.
    """
    count = sum(1 for missing in lost if missing)
    return _warning(
        "undelivered",
        f"{count} of {len(lost)} summaries hold characters that the tokenizer of {target!r} cannot spell; they were "
        f"delivered without these ({sum(lost)} in all)",
    )


_WHAT = {"random": "random vectors of their norms", "shuffled": "the states of another example"}


def _warning(code: str, message: str) -> dict[str, str]:
    return {"code": code, "message": message}


def describe_rate(rate: Mapping[str, float]) -> str:
    """What a map of windows sends, in words.

    Args:
        rate: From :meth:`evaluate.injection.wire.Wire.rate`.
    """
    return (
        f"{rate['latents']} latents of {rate['latent_dim']} numbers a window, "
        f"{rate['latent_bytes_per_text_byte']:.1f} bytes for a byte of text"
    )


def describe(result: Mapping[str, Any]) -> str:
    """The accuracies as a table for people.

    Args:
        result: The contents of ``communicate.json``.
    """
    lines = []
    for key, entry in result["tasks"].items():
        lines.append(
            f"{key}: {entry['source']} reads, {entry['target']} answers; {entry['n']} examples, "
            f"chance {entry['chance']:.1%} ({entry['chance_is']})"
        )
        pair, beside = None, ""
        for block in entry["conditions"].values():
            if block["pair"] != pair:
                pair = block["pair"]
                about = entry["pairs"][pair]
                rate = f"; {describe_rate(about['rate'])}" if "rate" in about else ""
                lines.append(f"  {pair}, {about['map_numbers']} numbers in the map{rate}")
                leak, known = about.get("leak"), "leak" in about
                if told := leak_words(leak, known=known):
                    lines.append(f"    {told}")
                mark = leak_mark(leak, known=known)
                beside = f"  [{mark}]" if mark else ""
            low, high = block["ci95"]
            indent = "  " if pair is None else "    "
            lines.append(
                f"{indent}{block['condition']:{20 - len(indent)}} {block['accuracy']:6.1%}  "
                f"({low:.1%} .. {high:.1%})  {human_bytes(block['bytes']):>8}{beside}"
            )
        lines += [f"  {name}: not run, {reason}" for name, reason in entry["reasons"].items()]
        lines += [f"  warning: {warning['message']}" for warning in entry["warnings"]]
    return "\n".join(lines)
