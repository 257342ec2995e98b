"""Real tokenizers over real languages: no pair joins different bytes, none that is right is lost, no text is refused.

The truth is an independent reconstruction of what every token has read (`tests/support/token_bytes.py`), which two of
the tests compare with what the families' publishers say themselves. A tokenizer is loaded once; what it read is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor

from featstore.text.tokens import tokenize
from tests.support.conversion import read_ranks
from tests.support.declarations import LANGUAGES, composed, declarations, decomposed, of_other_kinds, windows
from tests.support.real_tokenizers import FAMILIES, load, published
from tests.support.registries import UnreachableError
from tests.support.same_bytes import Ints, Reading, Spelling, former_keys, judge, keys_of, read, store_pairs
from tests.support.token_bytes import NOWHERE, alphabet, character_ends

pytestmark = pytest.mark.registries

#: Characters of a window, and windows of a language.
WINDOW, WINDOWS = 400, 4
#: Characters of every declaration that all tokenizers read.
SAMPLE = 500


@cache
def texts() -> dict[str, list[str]]:
    """Windows by language or kind; two languages also with their marks apart."""
    paragraphs = declarations()
    found = {language: windows(paragraphs[file], WINDOW)[:WINDOWS] for language, file in LANGUAGES.items()}
    apart = {f"{name}, marks apart": decomposed(found[name]) for name in ("Vietnamese", "Korean")}
    whole = {"Vietnamese, composed": composed(found["Vietnamese"])}
    return found | apart | whole | of_other_kinds()


@cache
def all_windows() -> tuple[list[str], list[str]]:
    """All of them in one list, and the language or kind of each."""
    pairs = [(window, name) for name, found in texts().items() for window in found]
    return [window for window, _ in pairs], [name for _, name in pairs]


@cache
def samples() -> dict[str, str]:
    """The beginning of every declaration, in the form that texts are read in."""
    return {name: composed(["\n".join(found)[:SAMPLE]])[0] for name, found in declarations().items()}


@dataclass(frozen=True)
class Read:
    """What was found out about one tokenizer; the tokenizer itself is not kept.

    Attributes:
        truth: What it reads in all windows.
        keys: The ends at which the store lets its tokens pair, and their rows.
        former: The same by the rule of format version 1.
        faults: What is wrong, a line each.
        refused: Declarations that it refuses.
    """

    truth: Reading
    keys: tuple[Ints, Ints]
    former: tuple[Ints, Ints]
    faults: list[str]
    refused: list[str]


@cache
def reading(family: str) -> Read | str:
    """What a family reads, or why it could not be had."""
    try:
        found, tokenizer = all_windows(), load(family)
    except UnreachableError as error:
        return str(error)
    texts, names = found
    spelling = Spelling.of_family(family, tokenizer)
    truth = read(tokenizer, spelling, texts)
    tokenized = tokenize(tokenizer, texts)
    faults = _faults(tokenizer, texts, names, truth, tokenized)
    refused = []
    for name, text in samples().items():
        sample = read(tokenizer, spelling, [text])
        try:
            own = tokenize(tokenizer, [text])
        except Exception as error:  # noqa: BLE001
            refused.append(f"{name}: {type(error).__name__}: {error}")
        else:
            faults += _faults(tokenizer, [text], [name], sample, own)
    return Read(truth, keys_of(tokenized), former_keys(tokenizer, texts), faults, refused)


def _faults(tokenizer: Any, texts: Sequence[str], names: Sequence[str], truth: Reading, tokenized: Any) -> list[str]:
    """Where tokens, special ones, or ends are not the true ones."""
    faults = []
    for number, (text, name, one) in enumerate(zip(texts, names, tokenized, strict=True)):
        ends, special = truth.ends[number], truth.special[number]
        if one.ids.tolist() != truth.ids[number] or one.special.tolist() != special.tolist():
            faults.append(f"{name}: other tokens in {text[:40]!r}")
            continue
        whole = (ends != NOWHERE) & character_ends(text)[np.maximum(ends, 0)]
        wrong = ~special & np.where(one.exact, one.byte_end != ends, whole)
        for at in np.flatnonzero(wrong)[:3]:
            around = tokenizer.convert_ids_to_tokens(truth.ids[number][max(at - 2, 0) : at + 3])
            faults.append(
                f"{name}: token {at} of {around} ends at {one.byte_end[at]} (exact: {one.exact[at]}), truly {ends[at]}"
            )
    return faults


def of(family: str) -> Read:
    """What a family reads; skips the test where it cannot be had."""
    found = reading(family)
    if isinstance(found, str):
        pytest.skip(found)
    return found


TOKENIZERS = [*FAMILIES, "smollm2"]


@pytest.mark.parametrize("family", TOKENIZERS)
def test_every_token_ends_where_its_own_bytes_do(family: str) -> None:
    assert of(family).faults == []


@pytest.mark.parametrize("family", TOKENIZERS)
def test_no_language_is_refused(family: str) -> None:
    assert of(family).refused == []
    assert len(samples()) == 532


def test_no_pair_joins_different_bytes_and_no_right_one_is_lost() -> None:
    found = {family: one for family in TOKENIZERS if isinstance(one := reading(family), Read)}
    if not found:
        pytest.skip(str(reading(TOKENIZERS[0])))
    windows, _ = all_windows()
    made, faults = 0, []
    for first, second in combinations(found, 2):
        sides = found[first], found[second]
        verdict = judge(sides[0].truth, sides[1].truth, store_pairs(sides[0].keys, sides[1].keys, windows))
        made += verdict.made
        if verdict.wrong or verdict.beside or verdict.lost:
            faults.append(f"{first} and {second}: {verdict}")
        inside = judge(sides[0].truth, sides[1].truth, store_pairs(sides[0].keys, sides[1].keys, windows, "byte"))
        if inside.wrong or inside.lost:
            faults.append(f"{first} and {second}, policy byte: {inside}")
    assert faults == []
    assert made > 5000 * len(found) * (len(found) - 1) / 2


def test_the_truth_sees_what_the_former_rule_did_wrong() -> None:
    first, second = of("llama4"), of("gemma3")
    windows, names = all_windows()
    starts = np.r_[0, np.cumsum([len(ids) for ids in first.truth.ids])]
    burmese = [number for number, name in enumerate(names) if name == "Burmese"]
    rows = store_pairs(first.former, second.former, windows, "byte")
    inside = (rows[0] >= starts[burmese[0]]) & (rows[0] < starts[burmese[-1] + 1])
    verdict = judge(first.truth, second.truth, (rows[0][inside], rows[1][inside]))
    assert verdict.wrong > 0.01 * verdict.made


def test_at_least_twelve_families_and_twenty_languages() -> None:
    assert len(FAMILIES) >= 12
    assert len(LANGUAGES) >= 20


# What publishers say themselves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.kind in ("ranks", "tekken")])
def test_stand_ins_spell_the_bytes_in_the_file_of_ranks(family: str) -> None:
    try:
        source, tokenizer = published(family), load(family)
    except UnreachableError as error:
        pytest.skip(str(error))
    spelled = Spelling.of_family(family, tokenizer).tokens
    unused = bytes(set(range(256)) - set(alphabet().values()))
    published_bytes = read_ranks(FAMILIES[family], source)
    for i, content in published_bytes.items():
        # No text has a byte that UTF-8 does not use.
        assert spelled.get(i) == (None if any(byte in content for byte in unused) else content)


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.kind == "sentencepiece"])
def test_pieces_end_where_sentencepiece_says(family: str) -> None:
    try:
        source = published(family)
    except UnreachableError as error:
        pytest.skip(str(error))
    model, truth = SentencePieceProcessor(model_file=str(source)), of(family).truth
    compared = 0
    for window, ids, ends in zip(all_windows()[0], truth.ids, truth.ends, strict=True):
        pieces = model.encode(window, return_type="proto").pieces
        # The fast tokenizer puts no space before a text that begins with one, and transformers' converter joins runs of
        # spaces first, which SentencePiece joins last.
        if window.startswith((" ", "▁")) or "  " in window:
            continue
        assert [piece.id for piece in pieces] == ids[1:]
        # The bytes of a character are its last one's, which is where it has been read.
        said = [(piece.end, end) for piece, end in zip(pieces, ends[1:].tolist(), strict=True) if piece.surface]
        assert all(end == own for end, own in said)
        compared += len(said)
    assert compared > 10_000
