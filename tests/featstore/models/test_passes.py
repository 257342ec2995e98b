"""Passes that go on from what was read: alone, in branches, with chosen rows, beside padding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from featstore.errors import UnsupportedArchitectureError
from featstore.models.layout import Continuing
from featstore.models.loading import load_model
from featstore.models.passes import Passes
from featstore.models.references import ModelSpec
from featstore.models.residual import ResidualStream, forward, watching
from featstore.models.stack import ordinary_ids, residual_stream
from tests.support.tiny_models import small

#: Of prompts padded at the left; the tiny Mistral's sliding window has 24 tokens.
LENGTHS = (7, 30, 1, 12)


@pytest.fixture(scope="module", params=["llama", "mistral"])
def stream(request: pytest.FixtureRequest, tiny_llama: Path, tiny_mistral: Path) -> ResidualStream:
    path = {"llama": tiny_llama, "mistral": tiny_mistral}[request.param]
    return residual_stream(load_model(ModelSpec(request.param, str(path)), device="cpu", dtype="float32"))


def padded(stream: ResidualStream) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 1000, (len(LENGTHS), max(LENGTHS)), generator=generator)
    padding = torch.arange(max(LENGTHS))[None] < max(LENGTHS) - torch.tensor(LENGTHS)[:, None]
    return ids.masked_fill(padding, 0), padding


@torch.inference_mode()
def test_a_branch_leaves_its_origin_as_it_is(stream: ResidualStream) -> None:
    ids, padding = padded(stream)
    more, other = torch.arange(12).reshape(4, 3) + 50, torch.arange(9).reshape(3, 3) + 700
    alone, origin = Passes(stream), Passes(stream)
    for passes in (alone, origin):
        passes.read(ids, padding)
    rows = torch.tensor([3, 1, 3])
    branch, twin = origin.branch(rows), origin.branch()
    said = branch.read(other, keep=2)
    wanted = alone.read(more, keep=3)
    assert torch.equal(twin.read(more, keep=3), wanted)
    assert torch.equal(origin.read(more, keep=3), wanted)
    assert torch.equal(origin.logits, wanted)
    again = Passes(stream)
    again.read(ids[rows], padding[rows])
    torch.testing.assert_close(said, again.read(other, keep=2), rtol=1e-4, atol=1e-4)
    # On from there: both know how much each row has read.
    torch.testing.assert_close(branch.read(other), again.read(other), rtol=1e-4, atol=1e-4)
    model: Any = stream.model
    assert said.shape == (3, 2, model.config.vocab_size)


@torch.inference_mode()
def test_two_cannot_go_on_from_a_cache_that_is_written_in_place(stream: ResidualStream) -> None:
    from transformers import StaticCache

    passes = Passes(stream)
    model: Any = stream.model
    passes._name, passes._past = "past_key_values", StaticCache(config=model.config, max_cache_len=64)
    passes.read(torch.full((1, 2), 7))
    with pytest.raises(UnsupportedArchitectureError, match="two texts cannot go on from one StaticCache"):
        passes.branch()


# Models that go on in other ways than most.

#: The way that suits a model, and one that does not.
WAYS = {
    "llama": (Continuing(), None),
    "gpt_neox": (Continuing(), None),
    "bloom": (Continuing(), None),
    "qwen3_5_text": (Continuing(), None),
    "lfm2": (Continuing(), None),
    "deepseek_v4": (Continuing(), None),
    "bamba": (Continuing(positions=True), Continuing()),
    "mamba": (Continuing(kind="stepwise"), Continuing()),
    "jamba": (Continuing(kind="stepwise"), Continuing()),
    "rwkv": (Continuing(kind="recomputed"), Continuing()),
    "openai-gpt": (Continuing(kind="recomputed"), Continuing(kind="stepwise")),
    "gemma4_text": (Continuing(whole_logits=True), None),
}
PROMPT, ENDS = 9, (12, 13, 15)


def along(name: str, way: Continuing) -> ResidualStream:
    return replace(residual_stream(small(name)), continuing=way)


def in_parts(passes: Passes, ids: torch.Tensor) -> torch.Tensor:
    """Logits from the last token of the prompt on."""
    read = [passes.read(ids[:, :PROMPT])]
    for start, end in zip((PROMPT, *ENDS), ENDS, strict=False):
        read.append(passes.read(ids[:, start:end], keep=end - start))
    return torch.cat(read, dim=1)


def whole(stream: ResidualStream, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = forward(stream.model, input_ids=ids).logits
    return logits


@pytest.mark.parametrize("name", WAYS)
@torch.inference_mode()
def test_a_text_that_is_read_in_parts_is_the_text_in_one_pass(name: str) -> None:
    way, wrong = WAYS[name]
    stream = along(name, way)
    ids = ordinary_ids(stream.model, 2, ENDS[-1], seed=3)
    wanted = whole(stream, ids)[:, PROMPT - 1 :]
    torch.testing.assert_close(in_parts(Passes(stream), ids), wanted, rtol=1e-3, atol=1e-4)
    if wrong is not None:
        found = in_parts(Passes(along(name, wrong)), ids)
        assert (found - wanted).norm() > 0.02 * wanted.norm()


@pytest.mark.parametrize("whole_logits", [True, False])
@torch.inference_mode()
def test_a_stream_that_is_cut_for_the_logits_is_whole_with_all_of_them(whole_logits: bool) -> None:
    # Blocks that share keys are given the last token alone where its logits alone are asked for.
    stream = along("gemma4_text", Continuing(whole_logits=whole_logits))
    ids = ordinary_ids(stream.model, 2, PROMPT, seed=3)
    with watching(stream, [0, stream.depth]) as states:
        assert Passes(stream).read(ids, keep=1).shape[:2] == (2, 1)
    assert states[0].shape[1] == PROMPT
    assert states[stream.depth].shape[1] == (PROMPT if whole_logits else 1)


@pytest.mark.parametrize("name", ["llama", "qwen3_5_text", "lfm2", "jamba", "mamba", "rwkv", "openai-gpt", "bamba"])
@torch.inference_mode()
def test_two_texts_go_on_from_one_prompt(name: str) -> None:
    way, _ = WAYS[name]
    # Mamba's cache can neither be shared nor copied: what it holds is read again.
    stream = along(name, replace(way, branching="reread" if name == "mamba" else "shared"))
    ids, end = ordinary_ids(stream.model, 2, ENDS[0], seed=3), ENDS[0]
    rows = torch.tensor([1, 0, 1])
    wanted = whole(stream, ids)[:, PROMPT:]
    trunk = Passes(stream)
    trunk.read(ids[:, :PROMPT])
    chosen, other, late = trunk.branch(rows), trunk.branch(), trunk.branch(rows[:1])
    # Another text goes on first, and must leave nothing behind.
    other.read(ids.flip(0)[:, PROMPT:])
    mine = trunk.read(ids[:, PROMPT:], keep=end - PROMPT)
    torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-4)
    for branch, which in ((chosen, rows), (late, rows[:1])):
        found = branch.read(ids[which][:, PROMPT:], keep=end - PROMPT)
        torch.testing.assert_close(found, wanted[which], rtol=1e-3, atol=1e-4)
    # A branch of a branch, after tokens of its own.
    more = ordinary_ids(stream.model, 2, 2, seed=4)
    again = chosen.branch(torch.tensor([2, 1])).read(more)
    torch.testing.assert_close(
        again[:, 0], whole(stream, torch.cat([ids[[1, 0]], more], 1))[:, -1], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "openai-gpt", "bamba", "gemma4_text"])
@torch.inference_mode()
def test_a_prompt_that_is_padded_beside_a_longer_one_is_read_as_alone(name: str) -> None:
    stream = along(name, WAYS[name][0])
    ids = ordinary_ids(stream.model, 2, ENDS[0], seed=3)
    short = 5
    rows = ids[:, :PROMPT].clone()
    rows[1, PROMPT - short :] = ids[1, :short]
    padding = torch.zeros_like(rows, dtype=torch.bool)
    padding[1, : PROMPT - short] = True
    beside = Passes(stream)
    first = beside.read(rows, padding)
    later = [beside.read(ids[:, PROMPT : PROMPT + 2], keep=2), beside.branch(torch.tensor([1])).read(ids[1:, -1:])]
    text = torch.cat([ids[1:, :short], ids[1:, PROMPT : PROMPT + 2], ids[1:, -1:]], dim=1)
    wanted = whole(stream, text)[0, short - 1 :]
    found = torch.cat([first[1], later[0][1], later[1][0]])
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(first[0, 0], whole(stream, ids[:1, :PROMPT])[0, -1], rtol=1e-3, atol=1e-4)


@torch.inference_mode()
def test_without_padding_a_model_gets_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, seen = along("llama", Continuing()), []
    original = type(stream.model).forward

    def forward_(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(sorted(kwargs))
        return original(self, *args, **kwargs)

    forward_.__signature__ = __import__("inspect").signature(original)
    monkeypatch.setattr(type(stream.model), "forward", forward_)
    passes = Passes(stream)
    ids = ordinary_ids(stream.model, 1, 4)
    passes.read(ids)
    passes.read(ids[:, :1])
    passes.read(ids[:, :2], torch.tensor([[True, False]]))
    assert seen == [
        ["input_ids", "logits_to_keep", "use_cache"],
        ["input_ids", "logits_to_keep", "past_key_values", "use_cache"],
        ["attention_mask", "input_ids", "logits_to_keep", "past_key_values", "position_ids", "use_cache"],
    ]
