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

from align.judging.findings import Finding
from align.judging.sentences import placed
from evaluate.communication.messages import WIRE_FORMATS, read, received, state_bytes, text_bytes, wire_format, within
from evaluate.communication.tasks.base import Example, Task
from evaluate.communication.tasks.countries import LANDMARKS
from evaluate.communication.tasks.lookup import THINGS
from evaluate.communication.tasks.named import NAMES, make
from evaluate.communication.tasks.scoring import Names, is_right, words
from evaluate.communication.tasks.tipsheets import BAD, GOOD
from evaluate.communication.verdicts import (
    accuracy_interval,
    beats_of,
    condition_name,
    describe,
    figures,
    gain,
    warnings_of,
    wilson,
)
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
    task = make("countries", 200)
    for example in task.examples:
        person = example.context.partition(" ")[0]
        assert (example.question, example.cue) == (f"Which country is {person} in?", f"{person} is in")
        assert not task.is_right(example, f"{example.context} {example.question}")


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


@pytest.mark.parametrize("name", ["countries", "tipsheets", "lookup"])
def test_the_seed_decides_the_examples(name: str) -> None:
    assert make(name, 12, seed=5) == make(name, 12, seed=5)
    assert make(name, 12, seed=5) != make(name, 12, seed=6)
    assert len(make(name, 12).examples) == 12


def test_prompts_put_the_context_first_and_the_cue_last() -> None:
    example = Example("{It} rains.", "Wet?", ("yes",), cue="It is")
    task = Task("t", (example,))
    assert task.context_text(example) == "{It} rains."
    assert task.question_text(example) == "Question: Wet?\nAnswer: It is"
    assert task.text(example) == "{It} rains.\nQuestion: Wet?\nAnswer: It is"
    assert task.text(example, "Rain.") == "Rain.\nQuestion: Wet?\nAnswer: It is"
    assert task.summary_text(example) == "{It} rains.\nIn short,"
    assert Task("t", (Example("c", "q", ("a",)),)).question_text(Example("c", "q", ("a",))).endswith("Answer:")


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
        Task("t", ())
    with pytest.raises(SpecError, match="mixes"):
        Task("t", (Example("c", "q", ("a",)), Example("c", "q", ("a",), ("a", "b"))))
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
    assert (task.chance, task.chance_is) == (0.5, "always 'Yes.'")
    first = make(name, 1)
    assert first.examples == task.examples[:1]


def test_a_file_may_have_choices_and_cues(tmp_path: Path) -> None:
    two = {**GOOD_LINE, "choices": ["no", "yes"], "cue": " It is "}
    four = {**GOOD_LINE, "choices": ["yes", "no", "maybe", "東京"]}
    task = make(written(tmp_path / "t.jsonl", two, four), 9)
    # The first of two choices, or the second, is one of the two answers as well.
    assert (task.chance, task.chance_is) == (1.0, "always 'yes'")
    assert [(e.right, e.cue) for e in task.examples] == [(1, "It is"), (0, "")]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"context": 1,', "not valid JSON"),
        ("[1]", "a JSON list, expected an object"),
        ({"context": "c", "question": "q"}, "no 'answer'"),
        ({"answer": "c"}, "no 'context' and no 'question'"),
        ({**GOOD_LINE, "chioces": []}, "unknown field 'chioces'"),
        ({**GOOD_LINE, "context": "  "}, "'context' is '  ', not text"),
        ({**GOOD_LINE, "question": 3}, "'question' is 3, not text"),
        ({**GOOD_LINE, "cue": 3}, "'cue' is 3, not text"),
        ({**GOOD_LINE, "cluster": 3}, "'cluster' is 3, not text"),
        ({**GOOD_LINE, "answer": 3}, "'answer' is a list of 1, not text"),
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
    assert is_right(said, answers, Names(answers)) is right


@pytest.mark.parametrize(
    ("said", "first"),
    [
        ("France, Italy", "France"),
        ("not Italy but France", "Italy"),
        ("Great Britain", "Great Britain"),
        ("little Britain", "Britain"),
        ("It is the South of South Africa", "South Africa"),
        # The pronoun is no country.
        ("Let us say Italy", "Italy"),
        ("the US, not Italy", "US"),
        ("the uk", None),
        ("somewhere\nItaly", None),
    ],
)
def test_of_several_answers_the_first_counts(said: str, first: str | None) -> None:
    every = ("France", "Italy", "Britain", "Great Britain", "South Africa", "US", "UK")
    names = Names(every)
    assert [answer for answer in every if is_right(said, (answer,), names)] == ([] if first is None else [first])


def test_words_are_plain() -> None:
    assert words("Naïve — CAFÉ, 4 821!") == ["naive", "cafe", "4", "821"]


# The figures.


@pytest.mark.parametrize(("right", "n"), [(0, 10), (10, 10), (3, 10), (41, 50), (1, 1), (500, 1000)])
def test_the_interval_is_wilsons(right: int, n: int) -> None:
    reference = binomtest(right, n).proportion_ci(method="wilson")
    assert wilson(right, n) == pytest.approx((reference.low, reference.high), abs=1e-12)
    found = figures(np.arange(n) < right, 7.0, np.arange(n))
    assert found == {"accuracy": right / n, "ci95": list(wilson(right, n)), "right": right, "n": n, "bytes": 7.0}


def test_questions_of_one_cluster_widen_the_interval() -> None:
    """Five questions that always agree are one question: 20 of 100 are known no better than 4 of 20."""
    owner = np.repeat(np.arange(20), 5)
    together = np.isin(owner, (3, 7, 11, 15))
    low, high = accuracy_interval(together, owner)
    # The quantile is that of t with 19 degrees of freedom, and an unbiased variance divides by 19.
    wanted = wilson(0.2 * 19, 19, 2.093024)
    assert (low, high) == (pytest.approx(wanted[0], abs=0.01), pytest.approx(wanted[1], abs=0.01))
    # Clusters with nothing in common are hardly worse than questions that stand alone.
    apart = np.tile([True, False, False, False, False], 20)
    assert accuracy_interval(apart, owner)[1] == pytest.approx(wilson(20, 100, 2.093024)[1], abs=1e-6)
    # Where all are right or wrong, clusters are all that can be counted.
    assert accuracy_interval(owner < 0, owner) == pytest.approx(wilson(0, 20, 2.093024))
    assert accuracy_interval(owner >= 0, owner * 0) == pytest.approx(wilson(1, 1))


def test_intervals_of_clustered_accuracies_cover() -> None:
    """Thirty landmarks, each asked about four times, some of them known and some not."""
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(30), 4)
    covered = {"clusters": 0, "alone": 0}
    for _ in range(400):
        known = rng.beta(0.5, 0.5, 30)[owner]
        right = rng.random(120) < known
        for name, groups in (("clusters", owner), ("alone", np.arange(120))):
            low, high = accuracy_interval(right, groups)
            covered[name] += low <= 0.5 <= high
    assert 0.92 <= covered["clusters"] / 400 <= 0.98
    assert covered["alone"] / 400 < 0.85


ALONE = np.arange(40)


def test_a_gain_is_paired() -> None:
    first = np.array([True] * 8 + [False] * 2)
    same = gain(first, first, np.arange(10))
    assert (same["value"], same["p"], same["above"]) == (0.0, 1.0, False)
    assert same["ci95"][0] < 0 < same["ci95"][1], "no difference among ten questions is not known to be none"
    found = gain(first, ~first, np.arange(10))
    assert found["value"] == pytest.approx(0.6)
    assert (found["first_alone"], found["second_alone"], found["clusters"]) == (8, 2, 10)
    low, high = found["ci95"]
    assert -0.1 < low < 0.6 < high <= 1
    # Of 200 examples eight are gained and none lost: unpaired intervals of 0.50 and 0.46 would overlap by far.
    many = np.arange(200) < 100
    fewer = many.copy()
    fewer[:8] = False
    assert gain(many, fewer, np.arange(200))["above"]


@pytest.mark.parametrize(("alone", "above"), [(4, False), (5, False), (6, True)])
def test_four_to_none_of_forty_is_not_above(alone: int, above: bool) -> None:
    found = gain(alone > ALONE, ALONE < 0, ALONE)
    assert found["p"] == pytest.approx(2 * 0.5**alone)
    assert found["above"] is above
    # The interval alone would say so.
    assert found["ci95"][0] > 0


def test_questions_about_one_landmark_are_one_question() -> None:
    """Twelve to none, of which each four are about one landmark, are three to none."""
    owner = ALONE // 4
    assert gain(ALONE < 12, ALONE < 0, ALONE)["above"]
    found = gain(ALONE < 12, ALONE < 0, owner)
    assert (found["p"], found["above"], found["clusters"]) == (pytest.approx(0.25), False, 10)


def test_a_way_has_to_beat_everything_and_many_ways_are_many_tests() -> None:
    def against(**alone: int) -> dict[str, Any]:
        return {name: gain(count > ALONE, ALONE < 0, ALONE) for name, count in alone.items()}

    # 7 to none is p 0.0156, 6 to none 0.031, 9 to none 0.0039.
    clear, weak = against(silent=12, random=9, shuffled=12), against(silent=12, random=12, shuffled=7)
    level, partial = against(silent=12, random=3, shuffled=12), against(silent=12, random=12)
    found = beats_of({"a": clear, "b": weak, "c": level, "d": partial})
    assert [found[name]["beats"] for name in "abcd"] == [True, True, False, None]
    assert found["a"]["p"] == pytest.approx(2 * 0.5**9)
    assert found["b"]["p_adjusted"] == pytest.approx(2 * 2 * 0.5**7)
    assert found["d"] == {"p": None, "p_adjusted": None, "beats": None}
    # Among ten ways that show nothing the weak one is chance.
    crowd = {f"x{i}": level for i in range(10)}
    assert not beats_of({"b": weak, **crowd})["b"]["beats"]
    assert beats_of({"a": clear, **crowd})["a"]["beats"]
    worse = {name: gain(ALONE < 0, ALONE < 12, ALONE) for name in ("silent", "random", "shuffled")}
    assert beats_of({"w": worse})["w"] == {"p": 1.0, "p_adjusted": 1.0, "beats": False}


def test_equal_ways_rarely_beat_anything() -> None:
    """Eight ways that know nothing, forty questions: one in twenty tasks at most has a way that seems to."""
    rng = np.random.default_rng(1)
    won = 0
    for _ in range(100):
        gains = {
            str(way): {
                name: gain(rng.random(40) < 0.2, rng.random(40) < 0.2, ALONE)
                for name in ("silent", "random", "shuffled")
            }
            for way in range(8)
        }
        won += any(found["beats"] for found in beats_of(gains).values())
    assert won <= 5


def verdicts(**accuracies: float) -> list[Finding]:
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
            control: gain(right[f"{method} p"], right[f"{condition_name(method, control)} p"], np.arange(n))
            for control in ("random", "shuffled")
        }
        for method in ("replace", "sum", "mean", "aligned")
    }
    return warnings_of(right, ["p"], 0.05, gains, np.arange(n))


def test_a_clear_result_has_no_warning() -> None:
    assert verdicts() == []


@pytest.mark.parametrize(
    ("accuracies", "code", "says"),
    [
        ({"text": 0.08}, "text-near-chance", "the text itself gives only 8% where chance is 5%"),
        ({"text": 0.5, "silent": 0.5}, "text-no-better-than-silent", "with the text 50% are right, without it 50%"),
        ({"n": 29}, "few-examples", "29 examples"),
        (
            {"text": 0.15, "silent": 0.11},
            "text-no-better-than-silent",
            "no clear difference (4 to 0 questions, p 0.12)",
        ),
        (
            {"replace": 0.15},
            "no-better-than-control",
            "p, replace, random: 15% right with mapped states, 10% with this control",
        ),
        ({"replace": 0.1}, "no-better-than-control", "p, replace, random: 10% right with mapped states, 10% with"),
        ({"sum_shuffled": 0.6}, "no-better-than-control", "p, sum, shuffled: 60% right with mapped states, 60% with"),
        (
            {"aligned_random": 0.7},
            "no-better-than-control",
            "p, aligned, random: 60% right with mapped states, 70% with",
        ),
    ],
)
def test_what_a_careful_reader_would_object_to(accuracies: dict[str, float], code: str, says: str) -> None:
    found = verdicts(**accuracies)
    assert {warning["code"] for warning in found} == {code}
    assert says in placed(found[0])


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
