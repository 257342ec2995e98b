"""Communication: what B is shown in every condition, that its answers are the models' own, and planted truth."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import evaluate.communication.communicate as module
from align.judging.sentences import sentence
from align.layers import LayerPair
from align.maps.fitted import Adapter, Aligner, load_adapter
from align.runs.train import train
from align.settings import Settings
from evaluate.communication import messages, saying
from evaluate.communication.asking import Prompt, PutIn, ask, prompts_of
from evaluate.communication.communicate import COMMON, describe, identity, prepare
from evaluate.communication.messages import deliverable, read, within
from evaluate.communication.tasks.base import Example, Task
from evaluate.communication.tasks.named import make
from evaluate.communication.tasks.scoring import words
from evaluate.communication.verdicts import CONTROLS, METHODS, condition_name
from evaluate.injection.loading import Loaded, load
from evaluate.injection.positions import source_positions
from featstore.errors import OffsetError, SpecError, VocabularyError
from featstore.models.layout import Batching
from featstore.models.loading import inspect_model, load_model
from featstore.models.probe.prove import Needs, prove
from featstore.models.references import ModelSpec
from featstore.models.stack import residual_stream
from featstore.runtime.console import jsonable
from featstore.text import tokens
from featstore.text.tokens import TokenizedWindow, tokenize
from tests.support.architectures.building import build
from tests.support.architectures.kinds import some_ids
from tests.support.commands import strict_json
from tests.support.tokenizers import train_byte_level

NEW = 4
#: A control character without a token.
UNSPELT = "\x06"
NAMES = [condition_name(method, control) for method in METHODS for control in (None, *CONTROLS)]
TEXTS = ("The capital of France is", "Naïve 東京, and a longer prompt of more tokens:", "One", "Two – with a dash")


@pytest.fixture(scope="module")
def pair(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Maps between two models of different width, depth and tokenizer, in both directions."""
    run = tmp_path_factory.mktemp("communicate") / "run"
    train(Settings(str(tiny_store), "affine", both=True, layers="2"), run, quiet=True)
    adapter = load_adapter(run)
    models = {name: load(adapter, name, (), device="cpu", quiet=True) for name in ("llama", "mistral")}
    return SimpleNamespace(adapter=adapter, models=models)


@pytest.fixture(scope="module")
def result(pair: SimpleNamespace) -> dict[str, Any]:
    task = make("countries", 6)
    return prepare(pair.adapter, itself=True, max_new_tokens=NEW, models=pair.models, quiet=True).result(task)


def own_map(pair: SimpleNamespace, name: str, layer: int) -> Adapter:
    """The run with the identity of one layer in place of its maps."""
    aligner = identity(name, layer, pair.models[name].info.width)
    return replace(pair.adapter, aligners={aligner.pair.key: aligner})


def greedy(loaded: Loaded, text: str, length: int = NEW) -> str:
    """Alone and without a cache: the plainest way to a model's text."""
    ids = loaded.info.tokenizer(text, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.inference_mode():
        for _ in range(length):
            step = loaded.model(input_ids=ids, use_cache=False).logits[:, -1].argmax(dim=-1)
            if int(step) == loaded.model.generation_config.eos_token_id:
                break
            ids = torch.cat([ids, step[:, None]], dim=1)
    return str(loaded.info.tokenizer.decode(ids[0, start:], skip_special_tokens=True))


def quiet(_: float) -> None:
    pass


# What is asked is what is answered.


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_answers_of_a_batch_are_those_of_each_alone(pair: SimpleNamespace, name: str) -> None:
    loaded = pair.models[name]
    prompts = prompts_of(loaded, TEXTS, [()] * len(TEXTS), NEW)
    found = ask(loaded, prompts, {"alone": None}, length=NEW, tick=quiet)["alone"]
    assert found == [greedy(loaded, text) for text in TEXTS]


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_what_follows_may_come_in_a_second_pass(pair: SimpleNamespace, name: str) -> None:
    loaded = pair.models[name]
    whole = prompts_of(loaded, TEXTS, [()] * len(TEXTS), NEW)
    # Rests of two lengths: two batches.
    cut = [len(p.ids) - 1 - i % 2 for i, p in enumerate(whole)]
    cut = [max(at, 1) for at in cut]
    parts = [Prompt(p.ids[:at], p.ids[at:]) for p, at in zip(whole, cut, strict=True)]
    alone = {"alone": None}
    found = ask(loaded, parts, alone, length=NEW, tick=quiet)
    assert found == ask(loaded, whole, alone, length=NEW, tick=quiet)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_the_choice_is_that_of_the_highest_likelihood(pair: SimpleNamespace, name: str, split: bool) -> None:
    loaded = pair.models[name]
    options = ["Paris", "a small town by the sea", "4821", "x"]
    choices = [options, options[:2], options[1:], options[::-1]]
    prompts = prompts_of(loaded, TEXTS, choices, NEW)
    asked = [Prompt(p.ids[:1], p.ids[1:], p.choices) for p in prompts] if split else prompts
    found = ask(loaded, asked, {"alone": None}, length=NEW, tick=quiet)["alone"]
    for text, offered, prompt, at in zip(TEXTS, choices, prompts, found, strict=True):
        scores = []
        for option in offered:
            ids = loaded.info.tokenizer(f"{text} {option}", return_tensors="pt")["input_ids"]
            with torch.inference_mode():
                said = torch.log_softmax(loaded.model(input_ids=ids, use_cache=False).logits[0].double(), dim=-1)
            own = range(len(prompt.ids), ids.shape[1])
            scores.append(sum(float(said[i - 1, ids[0, i]]) for i in own))
        assert at == int(np.argmax(scores))
    assert len(set(found)) > 1


def test_prompts_on_either_side_of_a_switch_never_share_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """LongRoPE: the position encoding of a pass is that of its longest prompt."""
    model = build("phi3@longrope")
    stream = prove(model, Needs(continuing=True)).stream
    assert stream.batching.switch == 16
    info = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda row, **_: " ".join(map(str, row))))
    loaded: Any = SimpleNamespace(name="x", model=model, stream=stream, info=info, device=torch.device("cpu"))
    rows = [some_ids(seed, tokens)[0].tolist() for seed, tokens in ((1, 9), (2, 30), (3, 12), (4, 18))]
    found = ask(loaded, [Prompt(row, []) for row in rows], {"one": None, "two": None}, length=NEW, tick=quiet)
    expected = []
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([row])
            for _ in range(NEW):
                ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(dim=-1)], dim=1)
            expected.append(" ".join(map(str, ids[0, len(row) :].tolist())))
    assert found == {"one": expected, "two": expected}
    for prompt in (Prompt(rows[0], rows[1]), Prompt(rows[1][:17], [])):
        with pytest.raises(SpecError, match=r"'x': a prompt of \d+ tokens is read on to \d+, and .* changes at 16"):
            ask(loaded, [prompt], {"one": None}, length=NEW, tick=quiet)
    info.context, info.vocabulary = 256, 300
    monkeypatch.setattr(tokens, "tokenize", lambda *_: [SimpleNamespace(ids=np.array(row)) for row in rows[1:3]])
    with pytest.raises(SpecError, match=r"a prompt has 12 tokens; with 5 new ones it passes 16, where 'x' changes its"):
        prompts_of(loaded, ["long", "short"], [(), ()], 5)


def test_a_choice_is_what_follows_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    # The tokenizer adds to a text of its own; it joins the second choice with the prompt and swallows the third.
    ids = {"A b": [1, 7, 8], "A c": [1, 9], "A d": [1, 7], " b": [5, 8], " c": [5, 6, 4], " d": [5, 3]}
    info = SimpleNamespace(tokenizer=lambda text, **_: {"input_ids": ids[text]}, context=5, vocabulary=10)
    monkeypatch.setattr(tokens, "tokenize", lambda *_: [SimpleNamespace(ids=np.array([1, 7]))])
    loaded: Any = SimpleNamespace(name="a", info=info, stream=SimpleNamespace(batching=Batching()))
    [prompt] = prompts_of(loaded, ["A"], [("b", "c", "d")], 1)
    assert prompt == Prompt([1, 7], [], ([8], [5, 6, 4], [5, 3]))
    info.context = 4
    with pytest.raises(SpecError, match=r"the longest prompt has 2 tokens; with 3 new ones it exceeds"):
        prompts_of(loaded, ["A"], [("b", "c", "d")], 1)


def test_tokens_without_a_row_in_the_embedding_are_refused(pair: SimpleNamespace, tmp_path: Path) -> None:
    """In what the source reads, in what the answerer reads, and in what it may choose from."""
    for name in ("llama", "mistral"):
        loaded = pair.models[name]
        [whole] = tokenize(loaded.info.tokenizer, ["a lighthouse"])
        rows = int(whole.ids.max())
        small = replace(
            loaded, info=replace(loaded.info, vocabulary=rows, spec=ModelSpec(name, str(tmp_path / "none")))
        )
        message = rf"model '{name}': token .* has id {rows}, the embedding has {rows} rows"
        with pytest.raises(VocabularyError, match=message):
            read(small, ["a lighthouse"], [0], [3], [0])
        with pytest.raises(VocabularyError, match=message):
            prompts_of(small, ["a lighthouse"], [()], 1)
        with pytest.raises(VocabularyError, match=message):
            prompts_of(small, ["a"], [("lighthouse",)], 1)


def test_a_prompt_longer_than_the_context_is_refused(pair: SimpleNamespace) -> None:
    long = Example("word " * 1100, "Which?", ("word",))
    task = Task("long", (long,))
    with pytest.raises(SpecError, match=r"has \d+ tokens; with 16 new ones it exceeds the context of 'llama' \(1024\)"):
        prepare(pair.adapter, models=pair.models, quiet=True).result(task)


# What a tokenizer cannot spell.


@pytest.fixture
def unable(pair: SimpleNamespace, sample_texts: list[str]) -> dict[str, Loaded]:
    """The models, of which one has a tokenizer that lacks a character, as SmolLM2's does."""
    lacking = train_byte_level(sample_texts, dropped=UNSPELT)
    llama = pair.models["llama"]
    return {**pair.models, "llama": replace(llama, info=replace(llama.info, tokenizer=lacking))}


def test_a_summary_arrives_without_what_its_reader_cannot_spell(
    pair: SimpleNamespace, unable: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = ["whole", f"a{UNSPELT}b {UNSPELT}", "whole", UNSPELT]
    say = module.say
    monkeypatch.setattr(module, "say", lambda *given: replace(say(*given), summaries=list(written)))
    found = prepare(pair.adapter, max_new_tokens=2, models=unable, quiet=True).result(make("countries", 4))
    to_llama, to_mistral = (found["tasks"][f"countries ({way})"] for way in ("mistral->llama", "llama->mistral"))
    assert [each["summary"] for each in to_llama["examples"]] == ["whole", "ab ", "whole", ""]
    assert to_llama["undelivered"] == 3
    assert to_llama["conditions"]["summary"]["bytes"] == (5 + 3 + 5 + 0) / 4
    [said] = [sentence(warning) for warning in to_llama["warnings"] if warning["code"] == "undelivered"]
    assert said.startswith("2 of 4 summaries hold characters that the tokenizer of 'llama' cannot spell")
    assert said in describe(found)
    # The other reader can spell all of them.
    assert [each["summary"] for each in to_mistral["examples"]] == written
    assert to_mistral["undelivered"] == 0
    assert "undelivered" not in [warning["code"] for warning in to_mistral["warnings"]]


def test_what_nothing_makes_spellable_is_not_delivered(unable: dict[str, Loaded]) -> None:
    tokenizer = unable["llama"].info.tokenizer
    assert deliverable(tokenizer, f"x{UNSPELT}", str) == ("x", 1)
    assert deliverable(tokenizer, "xy", lambda message: message + UNSPELT * bool(message)) == ("", 2)


def test_an_example_that_cannot_be_spelt_is_named_before_anything_is_asked(
    pair: SimpleNamespace, unable: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ask", lambda *_, **__: pytest.fail("it was asked"))
    for context, question in ((f"Here{UNSPELT}.", "Where?"), ("Here.", f"Where{UNSPELT}?")):
        examples = (Example("There.", "Where?", ("there",)), Example(context, question, ("here",)))
        with pytest.raises(OffsetError, match=r"model 'llama': example 2: no token covers character"):
            prepare(pair.adapter, models=unable, quiet=True).result(Task("mine", examples))


def test_a_token_that_may_have_read_more_than_the_context_is_outside_of_it() -> None:
    # Two tokens share a character that was rewritten: the first has read something of it, and ends where it begins.
    window = TokenizedWindow(
        np.arange(5, dtype=np.int32),
        np.array([2, 4, 4, 6, 8], np.int32),
        np.zeros(5, bool),
        np.array([True, True, False, True, True]),
    )
    assert within(window, 0, 4).special.tolist() == [False, False, True, True, True]
    assert within(window, 2, 6).byte_end.tolist() == [0, 2, 2, 4, 6]
    assert within(window, 2, 6).exact.tolist() == [True, True, False, True, True]


# Planted truth: states that say the same as the text.


@pytest.mark.parametrize("choices", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_embeddings_put_back_are_the_text(
    pair: SimpleNamespace, name: str, choices: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of a model without a start token, the first token is a sink and would be kept back.
    monkeypatch.setattr(messages, "first_of_window", lambda window: np.zeros(len(window.ids), dtype=bool))
    # At layer 0 a token's state is the token: B must answer as if it had read the text.
    task = make("tipsheets" if choices else "lookup:2", 6, seed=4)
    adapter = own_map(pair, name, 0)
    found = prepare(adapter, form="float32", max_new_tokens=NEW, models=pair.models, quiet=True).result(task)
    [entry] = found["tasks"].values()
    for example in entry["examples"]:
        given = example["given"]
        assert given[f"aligned {name}:0->{name}:0"] == given["text"]
    # Other states give other words; of two choices they may give the same.
    other = [e["given"][f"aligned_shuffled {name}:0->{name}:0"] != e["given"]["text"] for e in entry["examples"]]
    assert choices or any(other)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_the_last_state_of_all_is_the_readers_next_word(pair: SimpleNamespace, name: str) -> None:
    # After the last block a state is what is said next: B's first token is the one A would go on with.
    loaded, depth = pair.models[name], pair.models[name].stream.depth
    task = make("countries", 5, seed=1)
    adapter = own_map(pair, name, depth)
    found = prepare(adapter, form="float32", max_new_tokens=1, models=pair.models, quiet=True).result(task)
    [entry] = found["tasks"].values()
    key = f"{name}:{depth}->{name}:{depth}"
    for example in entry["examples"]:
        assert example["given"][f"replace {key}"] == greedy(loaded, example["context"], 1)
        # The norm before the head takes any multiple of a state for the state.
        assert example["given"][f"sum {key}"] == example["given"][f"mean {key}"]
    assert any(e["given"][f"replace {key}"] != e["given"]["silent"] for e in entry["examples"])


def test_a_rotated_twin_answers_from_rotated_states(pair: SimpleNamespace, demo_models: SimpleNamespace) -> None:
    # The twin computes the same with every state h as h Q: with Q for the map it must answer as the model itself does.
    [rotation] = load_file(demo_models.twin_same / "rotation.safetensors").values()
    models = {}
    for name, path in (("smollm2", demo_models.smollm2), ("twin", demo_models.twin_same)):
        spec = ModelSpec(name, str(path))
        model = load_model(spec, device="cpu", dtype="float32")
        models[name] = Loaded(name, inspect_model(spec), model, residual_stream(model), {15: 150.0}, 5.0)
    own = identity("smollm2", 15, 576)
    across = Aligner(LayerPair("smollm2", (15,), "twin", 15), {**own.tensors, "weight": rotation})
    maps = {aligner.pair.key: aligner for aligner in (own, across)}
    entry = {**pair.adapter.card["models"]["llama"], "width": 576, "depth": 30}
    card = {**pair.adapter.card, "models": dict.fromkeys(models, entry)}
    run, task = replace(pair.adapter, card=card, aligners=maps), make("countries", 2, seed=1)
    lengths = {"max_new_tokens": 1, "summary_tokens": 2}
    found = prepare(run, form="float32", models=models, quiet=True, **lengths).result(task)["tasks"]
    itself, other = (found[f"countries (smollm2->{name})"]["examples"] for name in ("smollm2", "twin"))
    for one, two in zip(itself, other, strict=True):
        assert one["summary"] == two["summary"]
        for name in ("silent", "text"):
            assert one["given"][name] == two["given"][name]
        for name in (n for n in NAMES if "random" not in n):
            assert one["given"][f"{name} {own.pair.key}"] == two["given"][f"{name} {across.pair.key}"], name
    # What is put in counts: with random states the answers are others.
    key, ways = across.pair.key, ("replace", "mean", "aligned")
    assert any(
        e["given"][condition_name(way, None) + f" {key}"] != e["given"][condition_name(way, "random") + f" {key}"]
        for e in other
        for way in ways
    )


def test_b_reads_the_context_through_the_states_alone(pair: SimpleNamespace) -> None:
    loaded = pair.models["mistral"]
    width = loaded.info.width
    texts = ("Maria is at the city. Where", "Maria is at the river. Where")
    prompts = prompts_of(loaded, texts, [()] * 2, NEW)
    assert len(prompts[0].ids) == len(prompts[1].ids)
    end = len(prompts[0].ids) - 2
    parts = [Prompt(p.ids[:end], p.ids[end:], (), (1, 2, 4)) for p in prompts]
    states = [np.random.default_rng(0).standard_normal((3, width)).astype(np.float32)] * 2
    found = {
        keep: ask(loaded, parts, {"x": PutIn(2, states, "aligned", keep)}, length=12, tick=quiet)["x"]
        for keep in ("hide", "own")
    }
    assert found["hide"][0] == found["hide"][1]
    assert found["own"][0] != found["own"][1]


# What each condition is shown.


def shown(pair: SimpleNamespace, task: Task, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Any]:
    """By condition the prompts and what is put in, llama reading and mistral answering."""
    seen: dict[str, Any] = {}

    def spy(loaded: Loaded, prompts: Any, put_in: Mapping[str, PutIn | None], **rest: Any) -> Any:
        for name, given in put_in.items():
            seen[name if name != "summary" else f"{name} {loaded.name}"] = (prompts, given)
        return ask(loaded, prompts, put_in, **rest)

    for room in (module, saying):
        monkeypatch.setattr(room, "ask", spy)
    aligners = {key: a for key, a in pair.adapter.aligners.items() if key.startswith("llama")}
    adapter = replace(pair.adapter, aligners=aligners)
    seen["result"] = prepare(adapter, max_new_tokens=NEW, models=pair.models, quiet=True, **options).result(task)
    return seen


def test_every_condition_is_shown_what_it_says(pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make("countries", 5, seed=2)
    seen = shown(pair, task, monkeypatch, summary_tokens=3)
    decode = pair.models["mistral"].info.tokenizer.decode
    [entry] = seen["result"]["tasks"].values()
    a_reads, b_reads = seen["summary llama"][0], seen["summary mistral"][0]
    for i, (example, told) in enumerate(zip(task.examples, entry["examples"], strict=True)):
        question = f"Question: {example.question}\nAnswer: {example.cue}"
        text = f"{example.context}\n{question}"
        assert decode(seen["silent"][0][i].ids, skip_special_tokens=True) == question
        assert decode(seen["text"][0][i].ids, skip_special_tokens=True) == text
        wanted = pair.models["mistral"].info.tokenizer(f"{told['summary']}\n{question}")["input_ids"]
        assert b_reads[i].ids == wanted
        source = pair.models["llama"]
        assert source.info.tokenizer.decode(a_reads[i].ids) == f"{example.context}\nIn short,"
        assert told["summary"] == " ".join(greedy(source, f"{example.context}\nIn short,", 3).split())
        for name in NAMES:
            prompt = seen[f"{name} llama:2->mistral:2"][0][i]
            if name.startswith("aligned"):
                assert decode([*prompt.ids, *prompt.rest], skip_special_tokens=True) == text
                assert decode(prompt.ids, skip_special_tokens=True) == example.context
                # All of the context but the start token, and what the source has read with its first token, a sink.
                a, b = (pair.models[name].info.tokenizer for name in ("llama", "mistral"))
                windows = [tokenize(tokenizer, [example.context])[0] for tokenizer in (a, b)]
                taken = source_positions(*windows)
                assert (taken[0], taken[1]) == (-1, 0)
                assert prompt.places == tuple(np.flatnonzero(taken > 0))
                assert prompt.places[-1] == len(prompt.ids) - 1
            else:
                assert decode(prompt.ids, skip_special_tokens=True) == question
                assert prompt.rest == []


def test_every_condition_puts_in_what_it_says(pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make("countries", 5, seed=2)
    key = "llama:2->mistral:2"
    seen = shown(pair, task, monkeypatch)
    put: dict[str, PutIn] = {name: seen[f"{name} {key}"][1] for name in NAMES}
    assert all(seen[name][1] is None for name in ("silent", "text", "summary llama", "summary mistral"))
    assert {name: (given.how, given.keep, given.layer) for name, given in put.items()} == {
        condition_name(method, control): (method, "hide" if method == "aligned" else "own", 2)
        for method in METHODS
        for control in (None, *CONTROLS)
    }
    aligner = pair.adapter.aligners[key]
    contexts = [e.context for e in task.examples]
    sizes = [len(text) for text in contexts]
    readings = read(pair.models["llama"], contexts, [0] * 5, sizes, (2,))
    for i, reading in enumerate(readings):
        # The state of A's last token, rounded to bfloat16 on its way and then mapped.
        sent = torch.from_numpy(reading.states[2][-1:]).bfloat16().float().numpy()
        mapped = aligner.apply(sent)
        np.testing.assert_array_equal(put["replace"].states[i], mapped)
        assert np.linalg.norm(put["random"].states[i]) == pytest.approx(np.linalg.norm(mapped), rel=1e-5)
        assert np.abs(put["random"].states[i] - mapped).max() > 0.1
        others = [j for j in range(5) if np.array_equal(put["shuffled"].states[i], put["replace"].states[j])]
        assert others
        assert all(not set(task.examples[j].answers) & set(task.examples[i].answers) for j in others)
        for name in ("sum", "mean"):
            np.testing.assert_array_equal(put[name].states[i], mapped)
        whole = put["aligned"].states[i]
        # The context's last token on either side is the full stop.
        np.testing.assert_allclose(whole[-1:], mapped, atol=1e-5)
        for name in ("aligned_random", "aligned_shuffled"):
            assert put[name].states[i].shape == whole.shape
        norms = [np.linalg.norm(put[name].states[i], axis=1) for name in ("aligned_random", "aligned")]
        np.testing.assert_allclose(*norms, rtol=1e-4)
        pool = np.concatenate([put["aligned"].states[j] for j in range(5) if j != i])
        foreign = put["aligned_shuffled"].states[i]
        assert all((pool == row).all(axis=1).any() for row in foreign)
        # In their order: the last one is another context's last.
        ends = [put["aligned"].states[j][-1] for j in range(5) if j != i]
        assert any(np.array_equal(foreign[-1], end) for end in ends)


@pytest.mark.parametrize("side", ["source", "target"])
def test_an_attention_sink_of_either_side_takes_no_part(
    pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    task = make("countries", 1, seed=2)
    [example] = task.examples
    size = len(example.context)
    readings = {}
    for name, text in (("llama", example.context), ("mistral", task.text(example))):
        [readings[name]] = read(pair.models[name], [text], [0], [size], (2,))
    name = {"source": "llama", "target": "mistral"}[side]
    own = readings[name]
    # The context's token of the largest norm becomes a sink; the first one is left out of its own accord.
    inside = np.flatnonzero(~own.window.special)[1:]
    norms = np.linalg.norm(own.states[2], axis=1)
    *_, second, sink = inside[norms[inside].argsort()]
    threshold = float(norms[second] + norms[sink]) / 2
    models = {**pair.models, name: replace(pair.models[name], median_norm={2: threshold / 5}, sink_threshold=5.0)}
    seen = shown(SimpleNamespace(adapter=pair.adapter, models=models), task, monkeypatch)
    [prompt], given = seen["aligned llama:2->mistral:2"]
    taken = source_positions(readings["llama"].window, readings["mistral"].window)
    # The source has no start token; its first token is a sink anyway.
    wanted = [p for p in np.flatnonzero(taken > 0) if sink != (taken[p] if side == "source" else p)]
    assert len(wanted) < (taken > 0).sum() < (taken >= 0).sum()
    assert list(prompt.places) == wanted
    assert len(given.states[0]) == len(wanted)


def test_a_context_is_found_after_words_that_come_before_it(
    pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Bytes are not characters, neither in what comes before the context nor in it; it has 21 bytes.
    example = Example("Zoë est à Orléans.", "Where?", ("Orléans",))
    prompts = {"context_prompt": "Voilà: {context}", "text_prompt": "Écoute, déjà: {context}\n{question}{cue}"}
    task, key = Task("voilà", (example,), **prompts), "llama:2->mistral:2"
    seen = shown(pair, task, monkeypatch)
    [prompt], given = seen[f"aligned {key}"]
    read_by = {"llama": "Voilà: ", "mistral": "Écoute, déjà: "}
    texts = {"llama": task.context_text(example), "mistral": task.text(example)}
    there, here = (
        tokenize(pair.models[name].info.tokenizer, [texts[name]])[0].byte_end - len(before.encode())
        for name, before in read_by.items()
    )
    # From where the source has read something of it, to its end.
    assert list(prompt.places) == np.flatnonzero((here >= there[there > 0].min()) & (here <= 21)).tolist()
    assert len(prompt.ids) == prompt.places[-1] + 1
    # Both end with the full stop, whose state is the one sent alone.
    np.testing.assert_allclose(given.states[0][-1:], seen[f"replace {key}"][1].states[0], atol=1e-5)


def test_examples_of_one_answer_have_no_shuffled_states(pair: SimpleNamespace) -> None:
    task = Task("same", tuple(Example(f"{n} rains.", "What?", ("rain",)) for n in ("It", "This")))
    adapter = own_map(pair, "mistral", 2)
    [entry] = prepare(adapter, max_new_tokens=1, models=pair.models, quiet=True).result(task)["tasks"].values()
    gone = [f"{name} mistral:2->mistral:2" for name in NAMES if "shuffled" in name]
    assert entry["reasons"] == dict.fromkeys(gone, "no two examples have different answers")
    assert not set(gone) & set(entry["conditions"])
    assert "not run, no two examples have different answers" in describe({"tasks": {"same": entry}})


# The result.


def test_the_result_has_every_condition_of_every_direction(result: dict[str, Any]) -> None:
    directions = [("llama", "mistral"), ("mistral", "llama"), ("mistral", "mistral"), ("llama", "llama")]
    assert list(result["tasks"]) == [f"countries ({a}->{b})" for a, b in directions]
    for (source, target), entry in zip(directions, result["tasks"].values(), strict=True):
        key = f"{source}:2->{target}:2"
        assert (entry["task"], entry["source"], entry["target"], entry["n"]) == ("countries", source, target, 6)
        assert list(entry["conditions"]) == [*COMMON, *(f"{name} {key}" for name in NAMES)]
        for name, block in entry["conditions"].items():
            assert name == " ".join(filter(None, (block["condition"], block["pair"])))
            low, high = block["ci95"]
            assert 0 <= low <= block["accuracy"] <= high <= 1
            assert block["right"] == round(block["accuracy"] * 6)
        assert (entry["pairs"][key]["map_numbers"] == 0) == (source == target)
        assert set(entry["gains"][f"sum {key}"]) == {"silent", *CONTROLS}
        assert "few-examples" in [w["code"] for w in entry["warnings"]]
    assert (result["format"], result["max_new_tokens"], result["decoding"]) == ("bfloat16", NEW, "greedy")
    strict_json(json.dumps(jsonable(result)))


def test_one_direction_is_called_by_the_task(pair: SimpleNamespace) -> None:
    found = prepare(own_map(pair, "mistral", 2), models=pair.models, quiet=True).result(make("lookup:1", 2))
    assert list(found["tasks"]) == ["lookup"]


def test_bytes_are_those_of_what_travels(pair: SimpleNamespace, result: dict[str, Any]) -> None:
    entry = result["tasks"]["countries (llama->mistral)"]
    sizes = {block["condition"]: block["bytes"] for block in entry["conditions"].values()}
    examples = entry["examples"]
    assert sizes["silent"] == 0
    assert sizes["text"] == pytest.approx(np.mean([len(e["context"].encode()) for e in examples]))
    assert sizes["summary"] == pytest.approx(np.mean([len(e["summary"].encode()) for e in examples]))
    # Llama's width is 48.
    assert {sizes[name] for name in NAMES if not name.startswith("aligned")} == {48 * 2}
    tokenizer = pair.models["llama"].info.tokenizer
    most = np.mean([len(tokenizer(e["context"])["input_ids"]) for e in examples])
    assert 0.6 * most <= sizes["aligned"] / (48 * 2) <= most
    assert sizes["aligned_random"] == sizes["aligned_shuffled"] == sizes["aligned"]


def test_accuracies_count_the_answers_given(pair: SimpleNamespace) -> None:
    # The right answers are what the model says with the text, where that has words, but for one of them.
    loaded = pair.models["mistral"]
    asked = [Example(f"{text} {i}", "What?", ("",)) for i in range(4) for text in TEXTS]
    said = [greedy(loaded, Task("said", (e,)).text(e), 3) for e in asked]
    lines = [(text.strip().splitlines() or [""])[0] for text in said]
    some = [i for i, line in enumerate(lines) if words(line)][:4]
    assert len(some) == 4
    answers = [lines[i] for i in some[:3]] + ["something else"]
    told = tuple(replace(asked[i], answers=(answer,)) for i, answer in zip(some, answers, strict=True))
    task, said = Task("said", told), [said[i] for i in some]
    found = prepare(own_map(pair, "mistral", 2), max_new_tokens=3, models=pair.models, quiet=True).result(task)
    block = found["tasks"]["said"]["conditions"]["text"]
    assert [e["given"]["text"] for e in found["tasks"]["said"]["examples"]] == said
    assert (block["right"], block["accuracy"]) == (3, 0.75)


def test_the_table_names_conditions_sizes_and_warnings(result: dict[str, Any]) -> None:
    text = describe(result)
    assert "countries (llama->mistral): llama reads, mistral answers; 6 examples, chance 16.7% (always " in text
    assert text.count("aligned_shuffled ") == 4
    assert "llama:2->mistral:2, 1616 numbers in the map" in text
    assert "96 B" in text
    assert "warning: 6 examples" in text


def planted(monkeypatch: pytest.MonkeyPatch, say: Callable[[str, int], str | int]) -> dict[str, PutIn | None]:
    """Answers that are made up, by condition and example; what was put in."""
    seen: dict[str, PutIn | None] = {}

    def stub(_: Loaded, prompts: Any, put_in: Mapping[str, PutIn | None], **rest: Any) -> dict[str, list[str | int]]:
        seen.update(put_in)
        rest["tick"](len(prompts) * len(put_in))
        return {name: [say(name.partition(" ")[0], i) for i in range(len(prompts))] for name in put_in}

    monkeypatch.setattr(module, "ask", stub)
    return seen


def test_gains_are_over_the_controls_of_the_same_method(pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make("countries", 16)
    # Every condition is right another number of times.
    right = {name: i for i, name in enumerate((*COMMON, *NAMES), start=1)}
    planted(monkeypatch, lambda name, i: task.examples[i].answers[0] if i < right[name] else "nowhere")
    found = prepare(own_map(pair, "mistral", 2), models=pair.models, quiet=True).result(task)["tasks"]["countries"]
    key = "mistral:2->mistral:2"
    assert {block["condition"]: block["right"] for block in found["conditions"].values()} == right
    for method in METHODS:
        others = {"silent": "silent"} | {control: condition_name(method, control) for control in CONTROLS}
        values = {name: block["value"] for name, block in found["gains"][f"{method} {key}"].items()}
        assert values == {name: (right[method] - right[other]) / 16 for name, other in others.items()}
    # The text is right where the question alone is, and once more.
    told = found["text_over_silent"]
    assert (told["first_alone"], told["second_alone"], told["clusters"]) == (right["text"] - right["silent"], 0, 16)
    assert set(found["beats"]) == set(found["gains"])


def test_a_choice_is_right_as_a_whole(pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task("two", (Example("He is in York.", "Where?", ("York",), ("York", "New York")),) * 2)
    planted(monkeypatch, lambda name, i: i if name == "text" else 1)
    found = prepare(own_map(pair, "mistral", 2), models=pair.models, quiet=True).result(task)["tasks"]["two"]
    assert found["scoring"] == "choice of the highest likelihood"
    assert [e["given"]["text"] for e in found["examples"]] == ["York", "New York"]
    assert (found["conditions"]["text"]["right"], found["conditions"]["silent"]["right"]) == (1, 0)


def test_the_seed_decides_the_controls_alone(pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    put = {}
    for run, seed in enumerate((0, 1, 1)):
        seen = planted(monkeypatch, lambda *_: "?")
        prepare(own_map(pair, "mistral", 2), seed=seed, models=pair.models, quiet=True).result(make("lookup", 3))
        put[run] = {name: np.concatenate(given.states) for name, given in seen.items() if given is not None}
    assert len(put[0]) == len(NAMES)
    for name, states in put[1].items():
        assert np.array_equal(states, put[2][name])
        assert "random" in name or "shuffled" in name or np.array_equal(states, put[0][name])
        assert "random" not in name or not np.allclose(states, put[0][name])


def test_a_map_of_a_layer_to_itself_is_tried_once(pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, lambda *_: "?")
    adapter, task = own_map(pair, "mistral", 2), make("lookup", 2)
    once, again = (
        prepare(adapter, itself=itself, models=pair.models, quiet=True).result(task) for itself in (False, True)
    )
    assert jsonable(once) == jsonable(again)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"form": "int8"}, "format 'int8' for states on the wire"),
        ({"summary_tokens": 0}, "length of the summary is 0"),
        ({"max_new_tokens": 0}, "length of the answer is 0"),
        ({"layers": "1"}, "this run maps layers 2"),
    ],
)
def test_what_cannot_be_is_refused(pair: SimpleNamespace, options: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        prepare(pair.adapter, models=pair.models, quiet=True, **options).result(make("lookup", 2))


def test_a_partner_has_another_answer() -> None:
    examples = [Example(str(i), "q", answers) for i, answers in enumerate((("a",), ("a", "b"), ("b",), ("c",)))]
    for seed in range(20):
        partners = module._partners(examples, np.random.default_rng(seed))
        assert partners is not None
        assert all(not set(examples[j].answers) & set(e.answers) for e, j in zip(examples, partners, strict=True))
    assert module._partners(examples[:2], np.random.default_rng(0)) is None


def test_states_of_another_come_in_their_order_and_number() -> None:
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    assert np.array_equal(module._stretched(rows, 3), rows)
    assert module._stretched(rows, 2).tolist() == [[0, 1], [4, 5]]
    assert module._stretched(rows, 4).tolist() == rows[[0, 1, 1, 2]].tolist()
    assert np.array_equal(module._stretched(rows[:0], 4), np.zeros((4, 2)))
