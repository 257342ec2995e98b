"""Tasks of one's own: a JSON object a line.

``{"context": "...", "question": "...", "answer": "..."}``, with ``"choices": ["...", ...]`` for questions that are
answered by choosing, ``"cue": "..."`` for how the answer begins, and several accepted answers as a list. Lines of one
context, or of one ``"cluster": "..."``, are no independent evidence, and intervals know that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from evaluate.communication.tasks.base import Example, Task
from evaluate.communication.tasks.scoring import words
from featstore.errors import CorruptDataError, SpecError
from featstore.runtime.provenance import parse_json
from featstore.runtime.schema import shown

_NEEDED = ("context", "question", "answer")
_KNOWN = (*_NEEDED, "choices", "cue", "cluster")


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
    return Task(f"jsonl:{path.name}", tuple(examples[:count]))


def _example(line: str, where: str) -> Example:
    try:
        value = parse_json(line.encode(), "it")
    except CorruptDataError as error:
        # The remedy is ours; the parser's is that of a file of results.
        _refuse(where, str(error).partition("; restore")[0])
    missing = [name for name in _NEEDED if name not in value]
    if missing:
        _refuse(where, f"no {' and no '.join(map(repr, missing))}")
    unknown = [name for name in value if name not in _KNOWN]
    if unknown:
        _refuse(where, f"unknown field {shown(unknown[0])}; known are {', '.join(_KNOWN)}")
    for name in ("context", "question"):
        if not (isinstance(value[name], str) and value[name].strip()):
            _refuse(where, f"{name!r} is {shown(value[name])}, not text")
    for name in ("cue", "cluster"):
        if not isinstance(value.get(name, ""), str):
            _refuse(where, f"{name!r} is {shown(value[name])}, not text")
    answers = _texts(value["answer"] if isinstance(value["answer"], list) else [value["answer"]], "answer", where)
    choices = _texts(value.get("choices") or [], "choices", where)
    if not choices and not all(words(answer) for answer in answers):
        _refuse(where, f"the answer {shown(value['answer'])} has no letter or digit to look for")
    if choices and (len(choices) < 2 or len(set(choices)) < len(choices)):
        _refuse(where, "'choices' need at least two texts, all different")
    if choices and answers[0] not in choices:
        _refuse(where, f"the answer {shown(answers[0])} is not among the choices")
    if choices and len(answers) > 1:
        _refuse(where, "one answer, where there are choices")
    cue, cluster = (value.get(name, "").strip() for name in ("cue", "cluster"))
    return Example(value["context"], value["question"], answers, choices, cue, cluster)


def _texts(values: Any, name: str, where: str) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(v, str) and v.strip() for v in values):
        _refuse(where, f"{name!r} is {shown(values)}, not text")
    if not values and name == "answer":
        _refuse(where, "'answer' is an empty list")
    return tuple(v.strip() for v in values)


def _refuse(where: str, what: str) -> NoReturn:
    raise SpecError(f"{where}: {what}; write " + '{"context": "...", "question": "...", "answer": "..."}')
