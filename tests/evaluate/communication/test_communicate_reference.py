"""Answers to many prompts under many conditions at once are those to each alone, taken the slow way."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate.communication.asking as module
from evaluate.communication.asking import Prompt, PutIn, ask
from evaluate.injection.loading import Loaded
from featstore.errors import SpecError
from featstore.models import residual as sites
from featstore.models.injection import aligned, inject, last
from featstore.models.layout import Batching, Continuing
from featstore.models.loading import inspect_model, load_model
from featstore.models.references import ModelSpec
from featstore.models.stack import residual_stream

NEW = 3
#: Of the part that takes states and of the rest; the tiny Mistral's sliding window has 24 tokens.
SIZES = ((7, 0), (30, 0), (1, 0), (12, 0), (2, 3), (27, 3), (9, 3), (5, 1))


@pytest.fixture(scope="module", params=["llama", "mistral"])
def loaded(request: pytest.FixtureRequest, tiny_llama: Path, tiny_mistral: Path) -> Loaded:
    spec = ModelSpec(request.param, str({"llama": tiny_llama, "mistral": tiny_mistral}[request.param]))
    model = load_model(spec, device="cpu", dtype="float32")
    return Loaded(spec.name, inspect_model(spec), model, residual_stream(model), {}, 5.0)


def prompts(sizes: tuple[tuple[int, int], ...] = SIZES, *, choices: bool = False) -> list[Prompt]:
    rng = np.random.default_rng(3)
    made = []
    for i, (size, rest) in enumerate(sizes):
        # Of one length in a prompt, as the sum favours the short; prompts of a batch may have others, and fewer.
        offered = [rng.integers(5, 3000, 1 + i % 3).tolist() for _ in range(6 - i % 4)] if choices else []
        ids = [1, *rng.integers(5, 3000, size - 1).tolist()]
        # The last one takes a state: a prompt without a rest goes on from it.
        places = tuple(sorted({*range(1, size, 3), size - 1} - {0}))
        made.append(Prompt(ids, rng.integers(5, 3000, rest).tolist(), tuple(offered), places))
    return made


def conditions(asked: list[Prompt], loaded: Loaded) -> dict[str, PutIn | None]:
    """Every way of putting states in, at several layers, next to none."""
    rng, width, depth = np.random.default_rng(5), loaded.info.width, loaded.stream.depth

    def states(counts: list[int]) -> list[np.ndarray]:
        return [rng.standard_normal((n, width)).astype(np.float32) * 3 for n in counts]

    given: dict[str, PutIn | None] = {"none": None}
    for how, layer in (("replace", 0), ("replace", 2), ("sum", 2), ("mean", 2), ("mean", depth)):
        given[f"{how} {layer}"] = PutIn(layer, states([1] * len(asked)), how)
    given["replace hide"] = PutIn(1, states([1] * len(asked)), "replace", "hide")
    for name, layer, keep in (("a", 2, "own"), ("b", 2, "hide"), ("c", 2, "hide"), ("d", 0, "hide")):
        given[f"aligned {name}"] = PutIn(layer, states([len(p.places) for p in asked]), "aligned", keep)
    return given


@torch.inference_mode()
def logits(loaded: Loaded, prompt: Prompt, given: PutIn | None, row: int, told: list[int]) -> torch.Tensor:
    """Those of ``told`` and what comes next, from one prompt alone: no padding, no condition beside it."""
    ids, scope = torch.tensor([prompt.ids]), nullcontext()
    if given is not None:
        own = sites.capture(loaded.stream, ids, [given.layer])[given.layer]
        if given.how == "aligned":
            injection = aligned(own, [given.states[row]], [prompt.places], layer=given.layer, keep=given.keep)
        else:
            injection = last(own, given.states[row], layer=given.layer, how=given.how, keep=given.keep)
        scope = inject(loaded.stream, injection, whole=False)
    with scope:
        output = loaded.model(input_ids=ids, use_cache=True)
        found, more = output.logits[0, -1:], [*prompt.rest, *told]
        if more:
            after = loaded.model(input_ids=torch.tensor([more]), past_key_values=output.past_key_values).logits[0]
            found = torch.cat([found, after])
    return found[len(prompt.rest) :].double()


def written(loaded: Loaded, prompt: Prompt, given: PutIn | None, row: int) -> str:
    told: list[int] = []
    while len(told) < NEW:
        told.append(int(logits(loaded, prompt, given, row, told)[-1].argmax()))
        if told[-1] == loaded.model.generation_config.eos_token_id:
            told.pop()
            break
    return str(loaded.info.tokenizer.decode(told, skip_special_tokens=True))


def likeliest(loaded: Loaded, prompt: Prompt, given: PutIn | None, row: int) -> int:
    scores = []
    for choice in prompt.choices:
        said = torch.log_softmax(logits(loaded, prompt, given, row, choice), dim=-1)
        scores.append(float(said[range(len(choice)), choice].sum()))
    return int(np.argmax(scores))


def taken(loaded: Loaded, asked: list[Prompt], given: Mapping[str, PutIn | None]) -> dict[str, list[str | int]]:
    ticks: list[float] = []
    found = ask(loaded, asked, given, length=NEW, tick=ticks.append)
    assert sum(ticks) == len(asked) * len(given)
    return found


@pytest.mark.parametrize(
    ("choices", "rows"), [pytest.param(False, 256, marks=pytest.mark.thorough), (False, 7), (True, 256)]
)
def test_many_at_once_answer_as_each_alone(
    loaded: Loaded, choices: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = prompts(choices=choices)
    given = conditions(asked, loaded)
    # So few rows cut both the prompts and the conditions.
    monkeypatch.setattr(module, "_ROWS", rows)
    monkeypatch.setattr(module, "_PROMPTS", min(rows, 64) - 4)
    found = taken(loaded, asked, given)
    slow = likeliest if choices else written
    for name, one in given.items():
        assert found[name] == [slow(loaded, prompt, one, row) for row, prompt in enumerate(asked)], name
    # The conditions differ, or this would show nothing.
    assert len({tuple(answers) for answers in found.values()}) > len(given) // 2


def test_an_answer_ends_with_its_own_text(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = prompts()
    full = taken(loaded, asked, {"none": None})["none"]
    # One that says a word and then another, which is made the end of a text.
    for row, prompt in enumerate(asked):
        first = int(logits(loaded, prompt, None, row, [])[-1].argmax())
        stop = int(logits(loaded, prompt, None, row, [first])[-1].argmax())
        if first != stop and loaded.info.tokenizer.decode([stop], skip_special_tokens=True):
            break
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", stop)
    found = taken(loaded, asked, {"none": None})["none"]
    assert found == [written(loaded, prompt, None, row) for row, prompt in enumerate(asked)]
    assert found[row] == loaded.info.tokenizer.decode([first], skip_special_tokens=True) != full[row]
    # A model may have several that end a text.
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", [loaded.model.config.vocab_size, stop])
    assert taken(loaded, asked, {"none": None})["none"] == found


def test_prompts_of_one_token_share_nothing(loaded: Loaded) -> None:
    asked = prompts(((1, 0), (1, 0)))
    asked[1].ids[0] = 77
    given = {name: one for name, one in conditions(asked, loaded).items() if "aligned" not in name}
    found = taken(loaded, asked, given)
    for name, one in given.items():
        assert found[name] == [written(loaded, prompt, one, row) for row, prompt in enumerate(asked)], name


def test_what_conditions_share_is_read_once(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = prompts(((20, 0), (18, 0)))
    given = {name: one for name, one in conditions(asked, loaded).items() if name == "none" or name.endswith(" 2")}
    given = {name: one for name, one in given.items() if "aligned" not in name}
    seen = []
    forward = loaded.model.forward

    def counted(*args: object, **kwargs: object) -> object:
        seen.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(loaded.model, "forward", counted)
    ask(loaded, asked, given, length=2, tick=lambda _: None)
    assert seen == [(2, 19), (8, 1), (8, 1)]


@pytest.mark.parametrize("choices", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        Continuing(kind="recomputed"),
        Continuing(branching="reread"),
        Continuing(kind="stepwise"),
        Continuing(padding=False),
    ],
    ids=["recomputed", "reread", "stepwise", "not padded"],
)
def test_answers_are_the_same_however_a_model_goes_on(loaded: Loaded, how: Continuing, choices: bool) -> None:
    # Two prompts of each length: those that may not be padded have company, too.
    asked = prompts((*SIZES[:4], *SIZES[:4], *SIZES[-2:]), choices=choices)
    given = conditions(asked, loaded)
    other = replace(loaded, stream=replace(loaded.stream, continuing=how))
    found, wanted = taken(other, asked, given), taken(loaded, asked, given)
    for name, answers in wanted.items():
        assert found[name] == answers, name


def test_prompts_on_either_side_of_a_switch_share_no_batch(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = prompts(((7, 0), (12, 0), (20, 0), (30, 0), (2, 3), (20, 3)))
    switching = replace(loaded, stream=replace(loaded.stream, batching=Batching("padded", 15)))
    seen = []
    forward = loaded.model.forward

    def counted(*args: object, **kwargs: object) -> object:
        if "past_key_values" not in kwargs:
            seen.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loaded.model, "forward", counted)
        found = taken(switching, asked, {"none": None})
    assert seen == [(2, 12), (2, 30), (1, 2), (1, 20)]
    assert found == taken(loaded, asked, {"none": None})
    # Of 13 tokens, which with three new ones pass 15; of 5 with a rest of 8; and one whose longest choice passes it.
    for prompt in (Prompt([1] * 13, []), Prompt([1] * 5, [7] * 8), Prompt([1] * 10, [], ([5], [6] * 6))):
        first = len(prompt.ids) - (not prompt.rest)
        message = rf"a prompt of {first} tokens is read on to 16, and the position encoding changes at 15"
        with pytest.raises(SpecError, match=message):
            ask(switching, [prompt], {"none": None}, length=NEW, tick=lambda _: None)
        assert ask(loaded, [prompt], {"none": None}, length=NEW, tick=lambda _: None)
    assert ask(switching, [Prompt([1] * 12, [])], {"none": None}, length=NEW, tick=lambda _: None)


# A prompt out of which nothing hidden may speak.


def test_a_hidden_prompt_needs_a_rest_or_a_state_at_its_end(loaded: Loaded) -> None:
    states = [np.ones((2, loaded.info.width), np.float32)] * 2
    for rest, places, sound in (([], (1, 2), False), ([7], (1, 2), True), ([], (1, 3), True)):
        asked = [Prompt([1, 5, 6, 7], rest, (), places), Prompt([1, 8, 6, 7], rest, (), places)]
        hidden = {"x": PutIn(1, states, "aligned", "hide")}
        if sound:
            # Two prompts that differ only in what is hidden or replaced.
            one, two = ask(loaded, asked, hidden, length=8, tick=lambda _: None)["x"]
            assert one == two
        else:
            with pytest.raises(SpecError, match="row 0: the prompt's last token took no state, and its own has read"):
                ask(loaded, asked, hidden, length=8, tick=lambda _: None)
        open_ = {"x": PutIn(1, states, "aligned", "own")}
        assert len(ask(loaded, asked, open_, length=8, tick=lambda _: None)["x"]) == 2
