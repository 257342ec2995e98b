"""Tasks: what they ask, that the answer is not given away, when an answer counts, and what the figures of it are."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from evaluate.communication.messages import WIRE_FORMATS, read, received, state_bytes, text_bytes, wire_format, within
from evaluate.communication.tasks.base import Example, Task, is_right, words
from evaluate.communication.tasks.countries import LANDMARKS
from evaluate.communication.tasks.lookup import THINGS
from evaluate.communication.tasks.named import NAMES, make
from evaluate.communication.tasks.tipsheets import BAD, GOOD
from evaluate.communication.verdicts import FEW, condition_name, describe, figures, gain, warnings_of, wilson
from evaluate.injection.loading import Loaded
from featstore.errors import SpecError
from featstore.models.loading import inspect_model, load_model
from featstore.models.references import ModelSpec
from featstore.models.residual import capture
from featstore.models.stack import residual_stream
from featstore.text import tokens
from featstore.text.tokens import TokenizedWindow, tokenize

# What is asked.


def test_every_landmark_comes_once_before_any_comes_again() -> None:
    assert len(LANDMARKS) >= 60
    assert len({name for name, _ in LANDMARKS}) == len(LANDMARKS)
    task = make("countries", 2 * len(LANDMARKS), seed=3)
    places = [example.context.partition(" is at ")[2].rstrip(".") for example in task.examples]
    for half in (places[: len(LANDMARKS)], places[len(LANDMARKS) :]):
        assert sorted(half) == sorted(name for name, _ in LANDMARKS)
    countries = dict(LANDMARKS)
    assert all(e.answers == countries[place] for e, place in zip(task.examples, places, strict=True))
    assert len({e.context.partition(" ")[0] for e in task.examples}) > 20


def test_a_country_is_never_given_away() -> None:
    for example in make("countries", 200).examples:
        person = example.context.partition(" ")[0]
        assert (example.question, example.cue) == (f"Which country is {person} in?", f"{person} is in")
        assert not is_right(f"{example.context} {example.question}", example.answers)


def test_the_chance_of_countries_is_the_share_of_the_commonest() -> None:
    counted = Counter(name for _, names in LANDMARKS for name in names)
    assert make("countries", 4).chance == pytest.approx(counted.most_common(1)[0][1] / len(LANDMARKS))


def test_a_tip_sheet_praises_the_right_company() -> None:
    for example in make("tipsheets", 40, seed=1).examples:
        notes = {note.partition(":")[0]: note for note in example.context.rstrip(".").split(". ")}
        assert set(notes) == set(example.choices)
        [worse] = set(example.choices) - set(example.answers)
        assert sum(signal in notes[example.answers[0]] for signal in GOOD) == 2
        assert sum(signal in notes[worse] for signal in BAD) == 2
        assert example.choices[example.right] == example.answers[0]
        assert all(choice in example.question for choice in example.choices)


def test_neither_order_nor_position_tells_the_better_company() -> None:
    task = make("tipsheets", 80)
    cells = Counter((e.context.startswith(e.answers[0]), e.right) for e in task.examples)
    assert cells == dict.fromkeys([(a, b) for a in (True, False) for b in (0, 1)], 20)
    assert task.chance == 0.5
    assert task.has_choices


@pytest.mark.parametrize(("name", "pairs"), [("lookup", 4), ("lookup:1", 1), ("lookup:30", 30)])
def test_a_code_is_that_of_the_thing_asked_for(name: str, pairs: int) -> None:
    task = make(name, 30)
    asked = set()
    for example in task.examples:
        told = dict(part.removeprefix("The code of the ").split(" is ") for part in example.context[:-1].split(". "))
        thing = example.question.removeprefix("What is the code of the ").rstrip("?")
        assert len(set(told.values())) == len(told) == pairs
        assert example.answers == (told[thing],)
        assert example.cue == f"The code of the {thing} is"
        assert len(told[thing]) == 4
        asked.add(list(told).index(thing))
    # Not always the same place.
    assert len(asked) >= min(pairs, 4)
    assert task.chance == pytest.approx(1 / 9000)


@pytest.mark.parametrize("name", ["countries", "tipsheets", "lookup"])
def test_the_seed_decides_the_examples(name: str) -> None:
    assert make(name, 12, seed=5) == make(name, 12, seed=5)
    assert make(name, 12, seed=5) != make(name, 12, seed=6)
    assert len(make(name, 12).examples) == 12


def test_prompts_put_the_context_first_and_the_cue_last() -> None:
    example = Example("{It} rains.", "Wet?", ("yes",), cue="It is")
    task = Task("t", (example,), 0.5, "a coin")
    assert task.context_text(example) == "{It} rains."
    assert task.question_text(example) == "Question: Wet?\nAnswer: It is"
    assert task.text(example) == "{It} rains.\nQuestion: Wet?\nAnswer: It is"
    assert task.text(example, "Rain.") == "Rain.\nQuestion: Wet?\nAnswer: It is"
    assert task.summary_text(example) == "{It} rains.\nIn short,"
    assert Task("t", (Example("c", "q", ("a",)),), 0, "").question_text(Example("c", "q", ("a",))).endswith("Answer:")


@pytest.mark.parametrize(
    "name", ["", "country", "lookup:", "lookup:x", "lookup:0", "lookup:31", "jsonl:", "countries:3"]
)
def test_an_unknown_task_is_refused(name: str) -> None:
    with pytest.raises(SpecError, match="choose"):
        make(name, 5)


def test_no_examples_are_refused() -> None:
    with pytest.raises(SpecError, match="--examples 0: a task needs at least one"):
        make("countries", 0)
    with pytest.raises(SpecError, match="'t' has no examples"):
        Task("t", (), 0, "")
    with pytest.raises(SpecError, match="mixes"):
        Task("t", (Example("c", "q", ("a",)), Example("c", "q", ("a",), ("a", "b"))), 0, "")
    assert len(NAMES) == 5
    assert len(THINGS) == 30


# A file of one's own.

GOOD_LINE = {"context": "It rains.", "question": "Is it wet?", "answer": "yes"}


def written(path: Path, *lines: Any) -> str:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n", encoding="utf-8")
    return f"jsonl:{path}"


def test_a_file_gives_its_first_examples(tmp_path: Path) -> None:
    lines = [{**GOOD_LINE, "answer": answer} for answer in ("Yes.", ["yes", "sure"], "no", "sure")]
    name = written(tmp_path / "t.jsonl", lines[0], "", *lines[1:])
    task = make(name, 100)
    assert task.name == "jsonl:t.jsonl"
    assert [e.answers for e in task.examples] == [("Yes.",), ("yes", "sure"), ("no",), ("sure",)]
    assert (task.chance, task.chance_is) == (0.5, "always the most frequent answer")
    first = make(name, 1)
    assert first.examples == task.examples[:1]
    assert (first.chance, first.chance_is) == (0.0, "no answer occurs twice")


def test_a_file_may_have_choices_and_cues(tmp_path: Path) -> None:
    two = {**GOOD_LINE, "choices": ["no", "yes"], "cue": " It is "}
    four = {**GOOD_LINE, "choices": ["yes", "no", "maybe", "東京"]}
    task = make(written(tmp_path / "t.jsonl", two, four), 9)
    assert task.chance == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert [(e.right, e.cue) for e in task.examples] == [(1, "It is"), (0, "")]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"context": 1,', "not JSON"),
        ("[1]", "a JSON list, not an object"),
        ({"context": "c", "question": "q"}, "no 'answer'"),
        ({"answer": "c"}, "no 'context' and no 'question'"),
        ({**GOOD_LINE, "chioces": []}, "unknown field 'chioces'"),
        ({**GOOD_LINE, "context": "  "}, "'context' is '  ', not text"),
        ({**GOOD_LINE, "question": 3}, "'question' is 3, not text"),
        ({**GOOD_LINE, "cue": 3}, "'cue' is 3, not text"),
        ({**GOOD_LINE, "answer": 3}, r"'answer' is \[3\], not text"),
        ({**GOOD_LINE, "answer": []}, "'answer' is an empty list"),
        ({**GOOD_LINE, "answer": "?!"}, "no letter or digit"),
        ({**GOOD_LINE, "choices": "yes"}, "'choices' is 'yes', not text"),
        ({**GOOD_LINE, "choices": ["yes"]}, "at least two"),
        ({**GOOD_LINE, "choices": ["yes", "yes"]}, "all different"),
        ({**GOOD_LINE, "choices": ["no", "maybe"]}, "'yes' is not among the choices"),
        ({**GOOD_LINE, "answer": ["yes", "no"], "choices": ["no", "yes"]}, "one answer"),
        ({**GOOD_LINE, "choices": ["no", "yes"]}, "has choices, the lines before have none"),
    ],
)
def test_a_line_that_is_no_example_is_named(tmp_path: Path, line: Any, says: str) -> None:
    name = written(tmp_path / "t.jsonl", GOOD_LINE, "", line)
    with pytest.raises(SpecError, match=rf"t\.jsonl, line 3: .*{says}.*; write \{{"):
        make(name, 9)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"na\xefve", None])
def test_a_file_without_examples_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "t.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SpecError, match=r"t\.jsonl(: cannot be read .*; give a UTF-8 file| holds no example)"):
        make(f"jsonl:{path}", 9)


# When an answer counts.


@pytest.mark.parametrize(
    ("said", "answers", "right"),
    [
        (" France.", ("France",), True),
        ("in FRANCE, I think", ("France",), True),
        ("\n\n France\nItaly", ("France",), True),
        (" Italy.\nFrance", ("France",), False),
        (" Francescas", ("France",), False),
        ("", ("France",), False),
        ("the United Arab Emirates", ("United Arab Emirates",), True),
        ("Netherlands", ("The Netherlands",), True),
        ("United States of Arab Emirates", ("United Arab Emirates",), False),
        ("Turkiye", ("Turkey", "Türkiye"), True),
        ("14821", ("4821",), False),
        ("4821.", ("4821",), True),
        ("I say a", ("A",), True),
    ],
)
def test_an_answer_is_found_by_its_words(said: str, answers: tuple[str, ...], right: bool) -> None:
    assert is_right(said, answers) is right


def test_words_are_plain() -> None:
    assert words("Naïve — CAFÉ, 4 821!") == ["naive", "cafe", "4", "821"]


# The figures.


@pytest.mark.parametrize(("right", "n"), [(0, 10), (10, 10), (3, 10), (41, 50), (1, 1), (500, 1000)])
def test_the_interval_is_wilsons(right: int, n: int) -> None:
    reference = binomtest(right, n).proportion_ci(method="wilson")
    assert wilson(right, n) == pytest.approx((reference.low, reference.high), abs=1e-12)
    found = figures(np.arange(n) < right, 7.0)
    assert found == {"accuracy": right / n, "ci95": list(wilson(right, n)), "right": right, "n": n, "bytes": 7.0}


def test_a_gain_is_paired() -> None:
    first = np.array([True] * 8 + [False] * 2)
    assert gain(first, first) == {"value": 0.0, "ci95": [0.0, 0.0]}
    found = gain(first, ~first)
    assert found["value"] == pytest.approx(0.6)
    low, high = found["ci95"]
    assert -0.1 < low < 0.6 < high <= 1
    # Of 200 examples two are gained and none lost: unpaired intervals of 0.50 and 0.49 would overlap by far.
    many = np.arange(200) < 100
    fewer = many.copy()
    fewer[:8] = False
    assert gain(many, fewer)["ci95"][0] > 0


def verdicts(**accuracies: float) -> list[dict[str, str]]:
    n = round(accuracies.pop("n", 100))
    base = {"silent": 0.0, "text": 0.9, "summary": 0.5}
    for method in ("replace", "sum", "mean", "aligned"):
        base |= {method: 0.6} | {condition_name(method, control): 0.1 for control in ("random", "shuffled")}
    shares = base | accuracies
    right = {
        name if name in ("silent", "text", "summary") else f"{name} p": np.arange(n) < share * n
        for name, share in shares.items()
    }
    gains = {
        f"{method} p": {
            control: gain(right[f"{method} p"], right[f"{condition_name(method, control)} p"])
            for control in ("random", "shuffled")
        }
        for method in ("replace", "sum", "mean", "aligned")
    }
    return warnings_of(right, ["p"], 0.05, gains)


def test_a_clear_result_has_no_warning() -> None:
    assert verdicts() == []


@pytest.mark.parametrize(
    ("accuracies", "code", "says"),
    [
        ({"text": 0.08}, "text-near-chance", "the text itself gives only 8% where chance is 5%"),
        ({"text": 0.5, "silent": 0.5}, "text-no-better-than-silent", "with the text 50% are right, without it 50%"),
        ({"n": FEW - 1}, "few-examples", f"{FEW - 1} examples"),
        ({"replace": 0.1}, "no-better-than-control", "p, replace: 10% right with mapped states, 10% with random"),
        ({"sum_shuffled": 0.6}, "no-better-than-control", "p, sum: 60% right with mapped states, 60% with the states"),
        (
            {"aligned_random": 0.7},
            "no-better-than-control",
            "p, aligned: 60% right with mapped states, 70% with random",
        ),
    ],
)
def test_what_a_careful_reader_would_object_to(accuracies: dict[str, float], code: str, says: str) -> None:
    found = verdicts(**accuracies)
    assert [warning["code"] for warning in found] == [code]
    assert says in found[0]["message"]


def test_controls_are_called_by_what_they_control() -> None:
    names = [condition_name(method, control) for method in ("replace", "sum") for control in (None, "random")]
    assert names == ["replace", "random", "sum", "sum_random"]
    assert describe({"tasks": {}}) == ""


# What travels.


def test_bytes_on_the_wire() -> None:
    assert text_bytes("naïve") == 6
    sizes = {name: state_bytes(3, 576, wire_format(name)) for name in WIRE_FORMATS}
    assert sizes == {"bfloat16": 3456, "float16": 3456, "float32": 6912, "fp8": 3 * (576 + 4)}
    for name in ("int8", "float64", ""):
        with pytest.raises(SpecError, match="choose one of bfloat16, float16, float32, fp8"):
            wire_format(name)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "fp8"])
def test_states_arrive_rounded(name: str) -> None:
    rows = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32) * 30
    found = received(rows, wire_format(name))
    assert found.dtype == np.float32
    if name == "fp8":
        assert 1e-3 < np.abs(found - rows).max() / np.abs(rows).max() < 0.05
    else:
        wanted = torch.from_numpy(rows).to(getattr(torch, name)).float().numpy()
        np.testing.assert_array_equal(found, wanted)


def test_a_part_of_a_text_has_its_own_bytes() -> None:
    window = TokenizedWindow(
        np.arange(6, dtype=np.int32),
        np.array([0, 2, 4, 7, 9, 12], np.int32),
        np.array([True] + [False] * 5),
        np.ones(6, bool),
    )
    part = within(window, 2, 6)
    # Up to byte 2 is before it; 12 lies after it, as does 9, which straddles its end at 8.
    assert part.special.tolist() == [True, True, False, False, True, True]
    assert part.byte_end.tolist() == [0, 0, 2, 5, 0, 0]


def test_the_state_sent_alone_is_of_the_last_ordinary_token(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec("llama", str(tiny_llama))
    model = load_model(spec, device="cpu", dtype="float32")
    stream = residual_stream(model)
    [norms] = capture(stream, torch.tensor([[600, 700, 800]]), [2]).values()
    loaded = Loaded("llama", inspect_model(spec), model, stream, {2: float(norms[0, 1].norm())}, 5.0)
    # A line's end is this model's sink.
    for text, last in (("The city.", 2), ("The city.\n", 2), ("The city.\n\nThe", 5)):
        [reading] = read(loaded, [text], [0], [len(text)], [2])
        assert reading.last == last, text
        [alone] = capture(stream, torch.from_numpy(reading.window.ids.astype(np.int64))[None], [2]).values()
        np.testing.assert_allclose(reading.rows([2], [last])[0], alone[0, last], atol=1e-5)
    with pytest.raises(SpecError, match="gives 'llama' only special tokens and attention sinks"):
        read(loaded, ["\n"], [0], [1], [2])

    def with_end(*args: Any) -> list[TokenizedWindow]:
        [window] = tokenize(*args)
        special = np.arange(len(window.ids)) == len(window.ids) - 1
        return [TokenizedWindow(window.ids, window.byte_end, special, window.exact)]

    # Of a tokenizer that closes every text with a token of its own.
    monkeypatch.setattr(tokens, "tokenize", with_end)
    [reading] = read(loaded, ["The city."], [0], [9], [2])
    assert reading.last == 1


def test_many_contexts_are_read_as_each_alone(tiny_llama: Path) -> None:
    spec = ModelSpec("llama", str(tiny_llama))
    model = load_model(spec, device="cpu", dtype="float32")
    loaded = Loaded("llama", inspect_model(spec), model, residual_stream(model), {2: 5.4}, 5.0)
    # More than are passed at once, each with another beginning and end.
    texts = [f"{'Now, ' * (i % 5)}it rains{' and pours' * (i % 3)}. So" for i in range(20)]
    starts = [len("Now, ") * (i % 5) for i in range(20)]
    sizes = [len(text) - start - len(" So") for text, start in zip(texts, starts, strict=True)]
    found = read(loaded, texts, starts, sizes, [2])
    for reading, text, start, size in zip(found, texts, starts, sizes, strict=True):
        [alone] = read(loaded, [text], [start], [size], [2])
        for name in ("ids", "special", "byte_end"):
            assert np.array_equal(getattr(reading.window, name), getattr(alone.window, name))
        assert np.array_equal(reading.sink, alone.sink)
        assert reading.last == alone.last
        np.testing.assert_allclose(reading.states[2], alone.states[2], atol=1e-5)
    sinks = np.concatenate([reading.sink for reading in found])
    assert 0 < sinks.mean() < 1
