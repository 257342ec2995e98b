"""Where a model's blocks are and how its stream is laid out: found by running it, refused in one true line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from featstore.errors import ModelLoadError, UnsupportedArchitectureError
from featstore.models.layout import Axes
from featstore.models.residual import at_site, capture
from featstore.models.stack import (
    BATCH,
    TOKENS,
    embedding_rows,
    ordinary_ids,
    residual_stream,
    special_ids,
    start_id,
)
from tests.support.architectures.building import build
from tests.support.architectures.configuration import configuration
from tests.support.tiny_models import small
from tests.support.truth import expected_rows

#: Where the blocks are, the axes of the stream, the start token.
FOUND = {
    "llama": ("model.layers", 4, Axes(0, 1, (64,)), 1),
    "gpt2": ("transformer.h", 4, Axes(0, 1, (64,)), 299),
    "gpt_neox": ("gpt_neox.layers", 4, Axes(0, 1, (64,)), 0),
    "llama4": ("model.layers", 4, Axes(0, 1, (64,)), 1),
    "gemma3": ("model.language_model.layers", 4, Axes(0, 1, (64,)), 2),
    "deepseek_v4": ("model.layers", 4, Axes(0, 1, (4, 64)), 0),
    "gemma3n_text": ("model.layers", 6, Axes(1, 2, (4, 64)), 2),
    "openai-gpt": ("transformer.h", 4, Axes(0, 1, (64,)), 0),
    "bert": ("bert.encoder.layer", 4, Axes(0, 1, (64,)), 0),
}


def refusal(model: Any) -> str:
    with pytest.raises((UnsupportedArchitectureError, ModelLoadError)) as caught:
        residual_stream(model)
    message = str(caught.value)
    assert "\n" not in message
    return message


class TestFound:
    @pytest.mark.parametrize("name", FOUND)
    def test_blocks_and_axes(self, name):
        model = small(name)
        stream = residual_stream(model)
        found = (stream.path, stream.depth, stream.axes)
        assert found == FOUND[name][:3]
        assert stream.blocks is model.get_submodule(FOUND[name][0])
        assert stream.dtype == torch.float32
        assert stream.width == stream.axes.width == 64 * stream.axes.streams

    @pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v4", "gemma3n_text", "openai-gpt"])
    def test_rows_are_those_of_a_plain_hook(self, name):
        model = small(name)
        ids = ordinary_ids(model, 2, 9, seed=5)
        rows = expected_rows(model, name, ids)
        stream = residual_stream(model)
        assert set(rows) == set(range(stream.depth + 1))
        for layer, states in capture(stream, ids, sorted(rows)).items():
            assert states.shape == (2, 9, stream.width)
            assert torch.equal(states, rows[layer]), layer

    def test_the_image_part_of_a_checkpoint_has_blocks_too_and_they_are_not_taken(self):
        model = build("gemma3", with_images=True)
        assert any(path.endswith("vision_tower.encoder.layers") for path, _ in model.named_modules())
        assert residual_stream(model).path.endswith("language_model.layers")

    def test_a_stack_of_one_block(self):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(configuration("llama", num_hidden_layers=1)).eval()
        stream = residual_stream(model)
        assert stream.depth == 1
        ids = ordinary_ids(model, 1, 5)
        states = capture(stream, ids, [0, 1])
        assert torch.equal(states[0], model.get_input_embeddings()(ids))
        with torch.inference_mode():
            assert torch.equal(model.lm_head(model.model.norm(states[1])), model(ids).logits)

    def test_what_a_configuration_claims_does_not_count(self):
        model = build("llama")
        model.config.num_hidden_layers, model.config.hidden_size = 99, 7
        stream = residual_stream(model)
        assert (stream.depth, stream.width) == (4, 64)

    def test_a_model_is_run_once_and_again_when_it_has_changed(self):
        model, calls = build("llama"), []
        model.register_forward_hook(lambda *_: calls.append(1))
        first = residual_stream(model)
        with at_site(first, 1, lambda _: pytest.fail("the model was run under a hook")):
            second = residual_stream(model)
        assert calls == [1]
        assert (second.path, second.axes, second.blocks) == (first.path, first.axes, first.blocks)
        assert residual_stream(model.double()).dtype == torch.float64
        assert calls == [1, 1]
        model.model.layers = model.model.layers[:2]
        model.config.num_hidden_layers = 2
        assert residual_stream(model).depth == 2
        assert calls == [1, 1, 1]

    @pytest.mark.parametrize("at", ["register_forward_pre_hook", "register_forward_hook"])
    def test_hooks_of_others_are_a_part_of_the_model(self, at):
        model = build("llama")

        def steer(_, args, output=None):
            return (args[0] + 1,) if output is None else output + 1

        for block in model.model.layers:
            getattr(block, at)(steer)
        stream = residual_stream(model)
        assert (stream.path, stream.depth) == ("model.layers", 4)

    def test_no_hook_is_left_behind(self):
        model = build("gpt2")
        residual_stream(model)
        for module in model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks


class TestIds:
    def test_ordinary_ids_are_none_that_a_configuration_names(self):
        model = small("gemma3")
        special = special_ids(model.config)
        # Of the text part and of images, in the outer configuration and the inner one.
        assert {0, 1, 2, 299} <= special
        ids = ordinary_ids(model, 40, 50)
        assert ids.shape == (40, 50)
        assert not set(ids.flatten().tolist()) & special
        assert 0 <= int(ids.min()) <= int(ids.max()) < embedding_rows(model) == 300
        assert torch.equal(ids, ordinary_ids(model, 40, 50))
        assert not torch.equal(ids, ordinary_ids(model, 40, 50, seed=1))

    def test_lists_of_ids_and_inner_configurations_count(self):
        config = SimpleNamespace(
            to_dict=lambda: {
                "eos_token_id": [7, 8],
                "inner": {"audio_token_index": 5},
                "vocab_size": 3,
                "pad_token_id": None,
            }
        )
        assert special_ids(config) == {5, 7, 8}
        assert special_ids(None) == set()

    @pytest.mark.parametrize(
        ("ids", "start"),
        [
            ({"bos_token_id": 4, "eos_token_id": 5}, 4),
            ({"bos_token_id": None, "eos_token_id": 5, "pad_token_id": 6}, 5),
            ({"bos_token_id": None, "eos_token_id": [6, 5]}, 6),
            ({"bos_token_id": None, "eos_token_id": None, "pad_token_id": 6}, 6),
            ({"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}, 0),
            # Beyond the embedding there is no vector.
            ({"bos_token_id": 300, "eos_token_id": 9}, 9),
        ],
    )
    def test_the_start_is_the_first_of_the_special_tokens_that_a_model_has(self, ids, start):
        model = build("llama")
        for name, value in {"pad_token_id": None, **ids}.items():
            setattr(model.config, name, value)
        assert start_id(model) == residual_stream(model).start == start

    def test_a_vocabulary_of_special_tokens_alone_has_no_text(self):
        model = build("llama")
        model.config.eos_token_id = list(range(299))
        assert "has no two token ids for ordinary text" in refusal(model)


# Layouts.


@given(
    st.permutations(range(5)),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_rows_unfold_to_what_was_folded(order: list[int], sizes: list[int], batch: int, tokens: int, seed: int) -> None:
    order = [axis for axis in order if axis < 2 + len(sizes)]
    # Axis i of the model's own tensor is axis order[i] of (batch, tokens, *sizes).
    plain = torch.randn(batch, tokens, *sizes, generator=torch.Generator().manual_seed(seed))
    native = plain.permute(order).contiguous()
    inner = [axis for axis in order if axis > 1]
    axes = Axes(order.index(0), order.index(1), tuple(plain.shape[axis] for axis in inner))
    rows = axes.rows(native)
    assert rows.shape == (batch, tokens, axes.width)
    wanted = plain.permute(0, 1, *inner).reshape(batch, tokens, -1)
    assert torch.equal(rows, wanted)
    assert torch.equal(axes.native(rows), native)
    assert axes.native(rows).is_contiguous()
    assert axes.streams == axes.width // axes.sizes[-1]


def test_a_plain_stream_is_not_copied():
    native = torch.zeros(2, 3, 4)
    axes = Axes(0, 1, (4,))
    assert axes.rows(native) is native
    assert axes.native(native) is native


class Toy(nn.Module):
    """A model whose stream has any axes: ``order[i]`` is the axis of (batch, tokens, streams, width) at place i."""

    def __init__(self, order: tuple[int, ...], streams: int, width: int, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.order, self.streams = order, streams
        self.embedding = nn.Embedding(50, width)
        self.layers = nn.ModuleList(Mix(order, width) for _ in range(depth))
        self.head = nn.Linear(width, 50)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: torch.Tensor) -> Any:
        scales = torch.arange(1, self.streams + 1)[:, None]
        native = (self.embedding(input_ids)[:, :, None] * scales).permute(self.order).contiguous()
        for layer in self.layers:
            native = layer(native)
        back = [self.order.index(axis) for axis in range(4)]
        return SimpleNamespace(logits=self.head(native.permute(back).sum(dim=2)))


class Mix(nn.Module):
    def __init__(self, order: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.order, self.linear = order, nn.Linear(width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        back = [self.order.index(axis) for axis in range(4)]
        return (hidden + self.linear(hidden.permute(back)).permute(self.order)).contiguous()


@pytest.mark.parametrize(
    ("order", "streams", "width"),
    [
        # Sizes that are those of the first pass, of the second one, of both.
        ((0, 1, 2, 3), BATCH, TOKENS),
        ((0, 1, 2, 3), TOKENS, BATCH),
        ((2, 0, 1, 3), BATCH, TOKENS),
        ((2, 0, 1, 3), TOKENS, TOKENS),
        ((1, 0, 2, 3), BATCH, BATCH),
        ((0, 2, 1, 3), 2, 11),
        ((0, 1, 2, 3), 11, BATCH),
    ],
)
def test_an_axis_that_has_a_passs_size_by_chance_is_told_from_it(
    order: tuple[int, ...], streams: int, width: int
) -> None:
    model = Toy(order, streams, width)
    stream = residual_stream(model)
    inner = tuple((streams, width)[axis - 2] for axis in order if axis > 1)
    assert stream.axes == Axes(order.index(0), order.index(1), inner)
    ids = torch.tensor([[4, 5, 6, 7], [8, 9, 4, 3]])
    embedded = model.embedding(ids)
    wanted = torch.cat([embedded * (i + 1) for i in range(streams)], dim=-1)
    assert torch.equal(capture(stream, ids, [0])[0], wanted)
    with torch.inference_mode():
        clean = model(ids).logits
        own = capture(stream, ids, range(4))
        for layer, hidden in own.items():
            with at_site(stream, layer, lambda _, hidden=hidden: hidden):
                assert torch.equal(model(ids.flip(0)).logits, clean), layer


@pytest.mark.parametrize("width", [BATCH, TOKENS])
def test_a_width_of_a_passs_size_in_a_real_model(width: int) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=width, n_head=1, n_layer=2, vocab_size=40, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    stream = residual_stream(GPT2LMHeadModel(config).eval())
    assert stream.axes == Axes(0, 1, (width,))


# What there is no layer in.


class Plain(Toy):
    """A stream of (batch, tokens, 1, width), through blocks that a subclass calls in its own way."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__((0, 1, 2, 3), 1, 8, depth)

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden

    def forward(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.head(self.run(self.embedding(input_ids)[:, :, None])).sum(dim=2))


def toy(run: Any, **options: Any) -> nn.Module:
    return type("Toy", (Plain,), {"run": run})(**options)


def backwards(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    for layer in reversed(self.layers):
        hidden = layer(hidden)
    return hidden


def half(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    for layer in self.layers[::2]:
        hidden = layer(hidden)
    return hidden


def twice(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    return Plain.run(self, Plain.run(self, hidden))


def flat(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    rows = hidden.flatten(0, 1)[None]
    for layer in self.layers:
        rows = layer(rows)
    return rows[0].unflatten(0, hidden.shape[:2])


def unused(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    return hidden


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (backwards, "model Toy: layers runs its blocks in the order 3, 2, 1, 0; layers are defined where blocks run"),
        (half, "model Toy: layers does not run blocks 1, 3 on text;"),
        (twice, "model Toy: layers runs its 4 blocks 8 times in one pass;"),
        (flat, f"model Toy: the blocks in layers get no tensor with an axis of {BATCH} sequences and one of {TOKENS}"),
        (unused, "model Toy: one pass over ordinary tokens calls no list of blocks; it has no residual stream to read"),
    ],
)
def test_a_stack_of_another_kind_says_what_it_does(run: Any, message: str) -> None:
    assert refusal(toy(run)).startswith(message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hrm_text", "model HrmTextForCausalLM: model.L_module.layers runs its 4 blocks 24 times in one pass;"),
        ("mllama", "model MllamaForCausalLM: model.layers does not run block 3 on text;"),
        # Its attentions stand in a list; what they give back is added to the stream outside of it.
        (
            "xlm",
            "model XLMWithLMHeadModel: transformer.attentions hands each member something else than the one before",
        ),
    ],
)
def test_real_stacks_of_another_kind(name: str, message: str) -> None:
    assert refusal(small(name)).startswith(message)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("cpmant", "one of shape (3, 45, 64): 13 tokens became 45 positions"),
        ("reformer", "2 of shape (3, 16, 64): 13 tokens became 16 positions"),
        ("prophetnet", "one of shape (3, 39, 64): 13 tokens became 39 positions"),
        ("blt", ": 13 tokens became "),
    ],
)
def test_streams_of_something_else_than_tokens_say_what_the_tokens_became(name: str, instead: str) -> None:
    assert instead in refusal(small(name))


def test_what_is_changed_between_blocks_is_no_stream() -> None:
    def run(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return hidden

    assert refusal(toy(run)).startswith(
        "model Toy: layers hands each member something else than the one before gave back;"
    )


def test_blocks_that_give_back_something_else_are_no_stream() -> None:
    class Sums(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden.sum(dim=-1)

    def run(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + sum(layer(hidden) for layer in self.layers)[..., None]

    model = toy(run)
    model.layers = nn.ModuleList(Sums() for _ in range(3))
    assert refusal(model).startswith("model Toy: layers gives back no tensor of the shape it gets;")


def test_lists_inside_of_blocks_are_not_taken_for_the_blocks() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleList(Mix((0, 1, 2, 3), 8) for _ in range(7))

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            for each in self.inner:
                hidden = each(hidden)
            return hidden

    model = toy(Plain.run)
    model.layers = nn.ModuleList(Nested() for _ in range(2))
    # A shorter list before the blocks, called as they are.
    model.before = nn.ModuleList([Mix((0, 1, 2, 3), 8)])
    model.run = lambda hidden: Plain.run(model, model.before[0](hidden))
    stream = residual_stream(model)
    assert (stream.path, stream.depth) == ("layers", 2)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            nn.Linear(2, 2),
            "model Linear has no input embedding of token ids; choose a causal language model that reads text",
        ),
        (nn.Identity(), "model Identity has no weights; give a causal language model"),
        (nn.ModuleList(), "model ModuleList has no weights; give a causal language model"),
        (LlamaConfig, "type is no torch module; give a causal language model"),
        (None, "NoneType is no torch module; give a causal language model"),
    ],
)
def test_what_is_no_language_model_is_named(module: Any, message: str) -> None:
    assert refusal(module) == message


def test_a_forward_that_raises_is_named_with_its_reason() -> None:
    def run(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        raise ValueError("the mixer needs a kernel\nthat is not installed")

    assert refusal(toy(run)) == (
        f"model Toy cannot be run on {TOKENS} ordinary tokens: ValueError: the mixer needs a kernel; check that it is "
        "a causal language model that reads text alone"
    )
    silent = toy(lambda self, hidden: next(iter(())))
    assert "StopIteration" in refusal(silent)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in silent.modules())


def test_a_model_that_needs_more_than_text_is_named() -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    assert refusal(T5ForConditionalGeneration(config).eval()).startswith(
        f"model T5ForConditionalGeneration cannot be run on {TOKENS} ordinary tokens: ValueError: "
    )
