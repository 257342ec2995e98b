"""Figures of right and wrong answers, what a careful reader would object to, and the table for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student

from align.judging.findings import Finding, finding
from align.judging.sentences import described
from align.judging.table import limit
from align.statistics import LEVEL, SIGNIFICANT, holm, paired_proportions, ratio
from evaluate.injection.verified import leak_mark, leak_words
from featstore.runtime.console import human_bytes
from featstore.runtime.visible import inline

METHODS = ("replace", "sum", "mean", "aligned")
CONTROLS = ("random", "shuffled")
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


def wilson(right: float, n: float, quantile: float = _Z95) -> tuple[float, float]:
    """The score interval of a proportion (Wilson 1927): it holds at 0 and 1 and for few examples.

    (p + z^2/2n -+ z sqrt(p (1-p)/n + z^2/4n^2)) / (1 + z^2/n), with p = right/n.

    Args:
        right: Right answers; need not be whole.
        n: Answers.
        quantile: z; that of the standard normal for 95 %.
    """
    p, z2 = right / n, quantile**2
    middle = p + z2 / (2 * n)
    half = quantile * math.sqrt(max(p * (1 - p), 0.0) / n + z2 / (4 * n * n))
    # None and all right have 0 and 1 for an end, which rounding would miss.
    low = 0.0 if right == 0 else (middle - half) / (1 + z2 / n)
    high = 1.0 if right == n else (middle + half) / (1 + z2 / n)
    return low, high


def accuracy_interval(right: NDArray[np.bool_], clusters: ArrayLike) -> tuple[float, float]:
    """Wilson's 95 % interval where questions come in clusters.

    Counts are divided by the design effect, the variance between clusters over that of independent questions (Rao and
    Scott, Biometrics 48, 1992), and the quantile is of t with one degree of freedom less than there are clusters.

    Args:
        right: bool ``(n,)``.
        clusters: ``(n,)``, which questions belong together.
    """
    n, count = len(right), int(right.sum())
    owner = np.unique(np.asarray(clusters), return_inverse=True)[1]
    sizes = np.bincount(owner)
    if len(sizes) == n:
        return wilson(count, n)
    if len(sizes) == 1:
        # One piece of evidence, whose spread nobody knows.
        return wilson(count / n, 1)
    between = float(np.square(ratio(np.bincount(owner, weights=right), sizes).influence).sum())
    alone = float(np.square(ratio(right, np.ones(n)).influence).sum())
    # Where all are right, or none, nothing tells the questions of a cluster apart.
    effect = max(1.0, between / alone) if alone > 0 else n / len(sizes)
    return wilson(count / effect, n / effect, float(student.ppf((1 + LEVEL) / 2, len(sizes) - 1)))


def figures(right: NDArray[np.bool_], size: float, clusters: ArrayLike) -> dict[str, Any]:
    """Accuracy with its interval, and what was sent.

    Args:
        right: bool ``(n,)``.
        size: Mean bytes on the wire for an example.
        clusters: ``(n,)``, which questions belong together.
    """
    count = int(right.sum())
    return {
        "accuracy": count / len(right),
        "ci95": list(accuracy_interval(right, clusters)),
        "right": count,
        "n": len(right),
        "bytes": size,
    }


def gain(first: NDArray[np.bool_], second: NDArray[np.bool_], clusters: ArrayLike) -> dict[str, Any]:
    """How much more often the first is right on the same examples.

    Args:
        first: bool ``(n,)``.
        second: bool ``(n,)``.
        clusters: ``(n,)``, which questions belong together.
    """
    found = paired_proportions(first, second, clusters)
    return {
        "value": found.value,
        "ci95": [found.low, found.high],
        "p": found.p,
        "first_alone": found.first_alone,
        "second_alone": found.second_alone,
        "clusters": found.clusters,
        "above": found.above,
    }


#: What a way of sending states has to beat.
AGAINST = ("silent", *CONTROLS)


def beats_of(gains: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Which ways of sending states beat the question alone and both their controls.

    To beat all of them is an intersection of three tests, whose p value is the largest; the ways are as many tests as
    there are of them, and their p values are adjusted for that (Holm).

    Args:
        gains: By mapped condition, what :func:`gain` gives against each of :data:`AGAINST` that was run.
    """
    p = {
        name: max(against[other]["p"] if against[other]["value"] > 0 else 1.0 for other in AGAINST)
        if set(AGAINST) <= set(against)
        else None
        for name, against in gains.items()
    }
    adjusted = dict(zip(p, holm(list(p.values())), strict=True))
    return {
        name: {
            "p": p[name],
            "p_adjusted": (value := adjusted[name]),
            "beats": None
            if value is None
            else value <= SIGNIFICANT and all(against[other]["above"] for other in AGAINST),
        }
        for name, against in gains.items()
    }


def warnings_of(
    right: Mapping[str, NDArray[np.bool_]],
    pairs: Sequence[str],
    chance: float,
    gains: Mapping[str, Any],
    clusters: ArrayLike,
) -> list[Finding]:
    """What stands against reading the accuracies as communication.

    Args:
        right: By condition (``silent``, ``text``, ``summary``, and ``<condition> <pair>``) bool ``(n,)``.
        pairs: Keys of the layer pairs.
        chance: Accuracy of an answer that looks at nothing.
        gains: By mapped condition, what :func:`gain` gives against each control.
        clusters: ``(n,)``, which questions belong together.
    """
    n = len(right["text"])
    text, (lowest, _) = float(right["text"].mean()), accuracy_interval(right["text"], clusters)
    found: list[Finding] = []
    if n < limit("few-examples", "wanted"):
        low, high = wilson(n // 2, n)
        found.append(finding("few-examples", examples=n, wide=high - low))
    if lowest <= chance:
        found.append(finding("text-near-chance", text=text, lowest=lowest, chance=chance))
    told = gain(right["text"], right["silent"], clusters)
    if not told["above"]:
        silent = float(right["silent"].mean())
        found.append(finding("text-no-better-than-silent", text=text, silent=silent, **_counted(told)))
    for pair in pairs:
        for method in METHODS:
            # A map may lack a method: one of windows has no single states.
            against = gains.get(f"{method} {pair}", {})
            for control in CONTROLS:
                if control in against and not (told := against[control])["above"]:
                    where = {"pair": pair, "way": method, "control": control}
                    mapped, reached = (
                        float(right[f"{condition_name(method, c)} {pair}"].mean()) for c in (None, control)
                    )
                    found.append(
                        finding("no-better-than-control", where, mapped=mapped, reached=reached, **_counted(told))
                    )
    return found


def _counts(gain: Mapping[str, Any]) -> str:
    """Which questions tell, in words."""
    return f"{gain['first_alone']} to {gain['second_alone']} questions, p {gain['p']:.2g}"


def _counted(gain: Mapping[str, Any]) -> dict[str, Any]:
    return {name: gain[name] for name in ("first_alone", "second_alone", "p")}


def undelivered(lost: Sequence[int], target: str) -> Finding:
    """The finding about summaries that did not arrive whole.

    Args:
        lost: By example how many characters the target's tokenizer cannot spell; some at least.
        target: The target's name.
    """
    count = sum(1 for missing in lost if missing)
    return finding("undelivered", summaries=count, of=len(lost), target=target, characters=sum(lost))


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
            f"{inline(key)}: {entry['source']} reads, {entry['target']} answers; {entry['n']} examples{_of(entry)}, "
            f"chance {entry['chance']:.1%} ({entry['chance_is']})"
        )
        pair, beside = None, ""
        for name, block in entry["conditions"].items():
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
            counted = [f"{other} {gain['value']:+.1%} ({_counts(gain)})" for other, gain in _gains(entry, name)]
            lines += [f"{indent}  over {line}" for line in counted]
        beats = entry.get("beats", {})
        if tested := [name for name, found in beats.items() if found["beats"] is not None]:
            won = [name for name in tested if beats[name]["beats"]]
            lines.append(
                f"  {len(won)} of {len(tested)} ways to send states beat the question alone, random and shuffled states"
                f" (p adjusted for {len(tested)}){': ' + '; '.join(won) if won else ''}"
            )
        lines += [f"  {name}: not run, {reason}" for name, reason in entry["reasons"].items()]
        lines += [f"  {described(found)}" for found in entry["warnings"]]
    return "\n".join(lines)


def _gains(entry: Mapping[str, Any], name: str) -> list[tuple[str, Mapping[str, Any]]]:
    """What a condition is compared with, and the gains of it; a file of an earlier version has no counts to show."""
    found = entry.get("gains", {}).get(name, {}) if name != "text" else {"silent": entry.get("text_over_silent")}
    return [(other, gain) for other, gain in found.items() if gain and gain.get("first_alone") is not None]


def _of(entry: Mapping[str, Any]) -> str:
    clusters = entry.get("clusters")
    return f" in {clusters} clusters" if clusters is not None and clusters != entry["n"] else ""
