"""What a task gives to answers that do not read: the best of them on these very examples is its chance.

Accuracies are read against chance, so nothing may beat it that knows nothing: no answer that is always the same, no
place among the choices, no place among the answers that stand in the context, and not the question itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TypeVar

from evaluate.communication.tasks.example import Example
from evaluate.communication.tasks.scoring import Name, Names, first_line, name_of

_T = TypeVar("_T")
_ORDINALS = ("first", "second", "third")


def chance_of(examples: Sequence[Example], names: Names) -> tuple[float, str]:
    """The accuracy of the best answer that does not read, and what it is in words.

    Args:
        examples: All with choices, or none.
        names: All that counts as an answer of the task.
    """
    ways = _of_choices(examples) if examples[0].choices else _of_names(examples, names)
    # Of equal ones the first, which is the plainest.
    return max(ways, key=lambda way: way[0])


def _of_choices(examples: Sequence[Example]) -> Iterator[tuple[float, str]]:
    n, most = len(examples), max(len(example.choices) for example in examples)
    yield sum(1 / len(example.choices) for example in examples) / n, "one of the choices at random"
    answer, count = Counter(example.answers[0] for example in examples).most_common(1)[0]
    yield count / n, f"always {answer!r}"
    yield from _places([e.choices for e in examples], [{e.answers[0]} for e in examples], most, "choice")
    orders, right = [Names(e.choices) for e in examples], [{name_of(e.answers[0])} for e in examples]
    for where, text_of in _TEXTS:
        named = [_several(order.named(text_of(example))) for order, example in zip(orders, examples, strict=True)]
        yield from _places(named, right, most, f"of the choices in the {where}")


def _of_names(examples: Sequence[Example], names: Names) -> Iterator[tuple[float, str]]:
    n = len(examples)
    # In the order of the examples, so that of equally frequent ones it is always the same.
    accepted = [{name: a for a in example.answers if (name := name_of(a))[0]} for example in examples]
    for name, count in Counter(name for each in accepted for name in each).most_common(1):
        shown = next(each[name] for each in accepted if name in each)
        yield count / n, f"always {shown!r}"
    echoes = [names.named(first_line(_question(example)))[:1] for example in examples]
    yield sum(bool(set(echo) & set(each)) for echo, each in zip(echoes, accepted, strict=True)) / n, "the question"
    for where, text_of in _TEXTS:
        named = [_several(names.named(text_of(example))) for example in examples]
        yield from _places(named, accepted, max(map(len, named)), f"of the answers in the {where}")


def _question(example: Example) -> str:
    return f"{example.question} {example.cue}"


#: Texts in which an answer may stand.
_TEXTS: tuple[tuple[str, Callable[[Example], str]], ...] = (
    ("question", _question),
    ("context", lambda example: example.context),
)


def _several(named: Sequence[Name]) -> list[Name]:
    """What is named, each once; nothing where there is nothing to choose between: to repeat it is to have read it."""
    found = list(dict.fromkeys(named))
    return found if len(found) > 1 else []


def _places(
    options: Sequence[Sequence[_T]], right: Sequence[Collection[_T]], most: int, words: str
) -> Iterator[tuple[float, str]]:
    """The accuracy of every place from the beginning and from the end."""
    for place in range(most):
        for at, ordinal in ((place, _ordinal(place)), (-1 - place, "last" if not place else f"{_ordinal(place)} last")):
            hits = sum(
                offered[at] in wanted
                for offered, wanted in zip(options, right, strict=True)
                if -len(offered) <= at < len(offered)
            )
            yield hits / len(options), f"always the {ordinal} {words}"


def _ordinal(place: int) -> str:
    return _ORDINALS[place] if place < len(_ORDINALS) else f"{place + 1}th"
