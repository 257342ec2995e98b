"""Chance: no answer that does not read beats what a task states, whatever it says and wherever it takes it from."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from evaluate.communication.tasks.base import Example, Task
from evaluate.communication.tasks.countries import LANDMARKS
from evaluate.communication.tasks.named import make

NAMED = ["countries", "tipsheets", "lookup", "lookup:1", "lookup:2", "lookup:7"]
COUNTS = [1, 3, 40, 90]


def accuracy(task: Task, answers: Iterator[str]) -> float:
    return sum(task.is_right(e, a) for e, a in zip(task.examples, answers, strict=True)) / len(task.examples)


def options(task: Task, example: Example, text: str) -> list[str]:
    """What of the task's answers stands in a text, found by plain search rather than as tasks do it."""
    known = example.choices or {a for e in task.examples for a in e.answers} | set(task.others)
    near = [answer for answer in known if answer in text]
    places = sorted((m.start(), a) for a in near for m in re.finditer(rf"\b{re.escape(a)}\b", text))
    return list(dict.fromkeys(answer for _, answer in places))


def answers_of_nobody(task: Task) -> Iterator[tuple[str, list[str]]]:
    """Answers that do not read: what they are, and one for each example."""
    examples = task.examples
    every = sorted({a for e in examples for a in (*e.answers, *e.choices)} | set(task.others))
    for answer in every:
        yield f"always {answer}", [answer] * len(examples)
    for many in (every, every[::-1], [e.answers[0] for e in examples]):
        yield "a list of all answers", [", ".join(many)] * len(examples)
    yield "the question again", [f"{e.question} {e.cue}" for e in examples]
    yield "nothing", [""] * len(examples)
    if task.has_choices:
        for at in (0, -1):
            yield f"choice {at}", [e.choices[at] for e in examples]
    several = [options(task, e, e.context) for e in examples]
    for at in (0, 1, -1, -2):
        # The only code of a context is the answer: to find it is to have read.
        found = [o[at] if len(o) > 1 and -len(o) <= at < len(o) else "" for o in several]
        yield f"answer {at} of the context", found
    asked = [options(task, e, e.question) for e in examples]
    for at in (0, -1):
        yield f"answer {at} of the question", [o[at] if len(o) > 1 else "" for o in asked]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", NAMED)
def test_no_answer_that_does_not_read_beats_chance(name: str, count: int) -> None:
    task = make(name, count, seed=count)
    found = {what: accuracy(task, iter(given)) for what, given in answers_of_nobody(task)}
    best = max(found, key=found.__getitem__)
    assert found[best] <= task.chance + 1e-12, best
    # Chance is what such an answer reaches, and not some larger number; or that of choosing at random.
    at_random = sum(1 / len(e.choices) for e in task.examples) / count if task.has_choices else 0.0
    assert task.chance == pytest.approx(max(found[best], at_random))
    assert accuracy(task, (e.answers[0] for e in task.examples)) == 1.0


@pytest.mark.parametrize("name", NAMED)
def test_chance_is_what_it_is_in_other_samples(name: str) -> None:
    """The best answer on these examples does no better on others than sampling allows."""
    task, others = make(name, 60, seed=1), make(name, 120, seed=2)
    for what, given in answers_of_nobody(others):
        reached = accuracy(others, iter(given))
        assert reached <= task.chance + 4 * math.sqrt(task.chance * (1 - task.chance) / 60), what


def test_a_list_of_countries_counts_as_its_first() -> None:
    """Four countries were right about 22.4 % of the landmarks, eight about 38.2 %, where chance was 6.6 %."""
    task = make("countries", len(LANDMARKS))
    for many in (["Italy", "France", "Egypt", "Japan"], ["Italy", "France", "USA", "China", "Japan", "India", "UK"]):
        alone = accuracy(task, iter(many[:1] * len(LANDMARKS)))
        assert accuracy(task, iter([f"{', '.join(many)}."] * len(LANDMARKS))) == alone <= task.chance
    assert task.chance == pytest.approx(5 / 76)
    # Of forty landmarks another share has one country.
    few = make("countries", 40, seed=2)
    most = max(sum(c in e.answers for e in few.examples) for _, names in LANDMARKS for c in names)
    assert few.chance == most / 40


def test_every_place_of_a_code_is_asked_for_equally_often() -> None:
    for pairs, count in ((2, 40), (4, 40), (4, 42), (7, 100)):
        task = make(f"lookup:{pairs}", count)
        places = [options(task, e, e.context).index(e.answers[0]) for e in task.examples]
        counts = [places.count(place) for place in range(pairs)]
        assert max(counts) - min(counts) <= 1
        assert task.chance == pytest.approx(max(max(counts) / count, 1 / count))


def written(path: Path, *lines: dict[str, object]) -> str:
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return f"jsonl:{path}"


def test_a_file_whose_answers_have_a_place_has_that_for_chance(tmp_path: Path) -> None:
    first = [{"context": f"c{i}", "question": "q", "answer": f"a{i}", "choices": [f"a{i}", "no"]} for i in range(9)]
    task = make(written(tmp_path / "choices.jsonl", *first), 9)
    assert (task.chance, task.chance_is) == (1.0, "always the first choice")
    told = [
        {"context": f"One says {'no' if i else 'yes'}, one yes.", "question": "Which?", "answer": "yes"}
        for i in range(4)
    ]
    told += [{"context": "Is it no or yes or no?", "question": "Which?", "answer": "no"}]
    task = make(written(tmp_path / "last.jsonl", *told), 9)
    assert (task.chance, task.chance_is) == (0.8, "always 'yes'")
    echo = [{"context": "c", "question": f"Is it a{i}?", "answer": f"a{i}"} for i in range(5)]
    task = make(written(tmp_path / "echo.jsonl", *echo), 9)
    assert (task.chance, task.chance_is) == (1.0, "the question")


def test_examples_of_one_thing_are_one_cluster(tmp_path: Path) -> None:
    countries = make("countries", 2 * len(LANDMARKS))
    assert len({e.group for e in countries.examples}) == len(LANDMARKS)
    for example in make("tipsheets", 20).examples:
        assert example.group == example.answers[0]
    for example in make("lookup", 20).examples:
        assert f" {example.group}?" in example.question
    lines = [
        {"context": context, "question": "q", "answer": "a", **more}
        for context, more in (("x", {}), ("x", {}), ("y", {}), ("z", {"cluster": "k"}), ("w", {"cluster": " k "}))
    ]
    task = make(written(tmp_path / "t.jsonl", *lines), 9)
    assert [e.group for e in task.examples] == ["x", "x", "y", "k", "k"]
