"""Tasks of one's own: a JSON object a line.

``{"context": "...", "question": "...", "answer": "..."}``, with ``"choices": ["...", ...]`` for questions that are
answered by choosing, ``"cue": "..."`` for how the answer begins, and several accepted answers as a list.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from evaluate.communication.tasks.base import Example, Task, words
from featstore.errors import SpecError

_NEEDED = ("context", "question", "answer")
_KNOWN = (*_NEEDED, "choices", "cue")


def from_jsonl(path: Path, count: int | None = None) -> Task:
    """Read examples, the first ones of the file.

    Args:
        path: UTF-8, one JSON object a line; empty lines do not count.
        count: Examples at most, None for all.

    Raises:
        SpecError: The file cannot be read or holds no example, or a line is not one; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"--task jsonl:{path}: cannot be read ({error}); give a UTF-8 file of JSON lines") from error
    examples: list[Example] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            example = _example(line, f"--task jsonl:{path}, line {number}")
            if examples and bool(example.choices) != bool(examples[0].choices):
                has, had = ("has", "have none") if example.choices else ("has no", "have some")
                _refuse(f"--task jsonl:{path}, line {number}", f"{has} choices, the lines before {had}")
            examples.append(example)
    if not examples:
        raise SpecError(f"--task jsonl:{path} holds no example; write one JSON object a line")
    chosen = tuple(examples[:count])
    if chosen and chosen[0].choices:
        chance, chance_is = sum(1 / len(e.choices) for e in chosen) / len(chosen), "one of the choices at random"
    else:
        counted = Counter(answer for e in chosen for answer in {" ".join(words(a)) for a in e.answers})
        most = max(counted.values(), default=1)
        chance = most / len(chosen) if most > 1 else 0.0
        chance_is = "always the most frequent answer" if most > 1 else "no answer occurs twice"
    return Task(f"jsonl:{path.name}", chosen, chance=chance, chance_is=chance_is)


def _example(line: str, where: str) -> Example:
    try:
        value = json.loads(line)
    except ValueError as error:
        _refuse(where, f"not JSON ({error})")
    if not isinstance(value, dict):
        _refuse(where, f"a JSON {type(value).__name__}, not an object")
    missing = [name for name in _NEEDED if name not in value]
    if missing:
        _refuse(where, f"no {' and no '.join(map(repr, missing))}")
    unknown = [name for name in value if name not in _KNOWN]
    if unknown:
        _refuse(where, f"unknown field {unknown[0]!r}; known are {', '.join(_KNOWN)}")
    for name in ("context", "question"):
        if not (isinstance(value[name], str) and value[name].strip()):
            _refuse(where, f"{name!r} is {value[name]!r}, not text")
    if not isinstance(value.get("cue", ""), str):
        _refuse(where, f"'cue' is {value['cue']!r}, not text")
    answers = _texts(value["answer"] if isinstance(value["answer"], list) else [value["answer"]], "answer", where)
    choices = _texts(value.get("choices") or [], "choices", where)
    if not choices and not all(words(answer) for answer in answers):
        _refuse(where, f"the answer {value['answer']!r} has no letter or digit to look for")
    if choices and (len(choices) < 2 or len(set(choices)) < len(choices)):
        _refuse(where, "'choices' need at least two texts, all different")
    if choices and answers[0] not in choices:
        _refuse(where, f"the answer {answers[0]!r} is not among the choices")
    if choices and len(answers) > 1:
        _refuse(where, "one answer, where there are choices")
    return Example(value["context"], value["question"], answers, choices, value.get("cue", "").strip())


def _texts(values: Any, name: str, where: str) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(v, str) and v.strip() for v in values):
        _refuse(where, f"{name!r} is {values!r}, not text")
    if not values and name == "answer":
        _refuse(where, "'answer' is an empty list")
    return tuple(v.strip() for v in values)


def _refuse(where: str, what: str) -> NoReturn:
    raise SpecError(f"{where}: {what}; write " + '{"context": "...", "question": "...", "answer": "..."}')
