"""The residual stream: where a layer is, that reading stops early, that writing back what was read changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from featstore.errors import LayerRangeError
from featstore.models.residual import ResidualStream, at_site, capture, skipping_below
from featstore.models.stack import residual_stream

VOCABULARY = 60
DEPTH = 4
WINDOW = 5

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BUILDERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**COMMON)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**COMMON, sliding_window=WINDOW)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=DEPTH,
            n_head=4,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
}


@pytest.fixture(scope="module", params=BUILDERS)
def model(request):
    torch.manual_seed(3)
    made = BUILDERS[request.param]()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.uniform_(0.3, 2.0)
            else:
                parameter.normal_(std=0.25)
    return made.eval().requires_grad_(requires_grad=False)


@pytest.fixture(scope="module")
def stream(model) -> ResidualStream:
    return residual_stream(model)


@pytest.fixture
def skipping(stream) -> ResidualStream:
    """The stream of a model that was seen to do without the blocks below any layer."""
    return replace(stream, skips=frozenset(range(DEPTH + 1)))


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    """Three sequences of 17 tokens: longer than the sliding window."""
    return torch.randint(3, VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(1))


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


def counted(module: nn.Module, counts: dict[str, int], name: str):
    def count(*_):
        counts[name] = counts.get(name, 0) + 1

    return module.register_forward_hook(count)


class TestLayers:
    def test_depth_and_blocks(self, model, stream):
        assert stream.depth == DEPTH == len(stream.blocks)
        assert stream.decoder is model.get_decoder()

    def test_layer_k_is_what_transformers_calls_hidden_state_k_below_the_last(self, model, stream, ids):
        with torch.inference_mode():
            theirs = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        ours = capture(stream, ids, range(DEPTH + 1))
        assert len(theirs) == DEPTH + 1
        for layer in range(DEPTH):
            assert torch.equal(ours[layer], theirs[layer])
        assert not torch.allclose(ours[DEPTH], theirs[DEPTH], atol=1e-2)

    def test_the_last_layer_is_the_stream_before_the_final_norm(self, model, stream, ids):
        last = capture(stream, ids, [DEPTH])[DEPTH]
        norm = model.get_decoder().norm if hasattr(model.get_decoder(), "norm") else model.get_decoder().ln_f
        with torch.inference_mode():
            assert torch.equal(model.lm_head(norm(last)), logits(model, ids))

    def test_layer_0_is_the_embedding(self, model, stream, ids):
        first = capture(stream, ids, [0])[0]
        with torch.inference_mode():
            embedded = model.get_input_embeddings()(ids)
            if isinstance(model, GPT2LMHeadModel):
                embedded = embedded + model.transformer.wpe(torch.arange(ids.shape[1]))
        assert torch.equal(first, embedded)

    def test_any_choice_of_layers_gives_the_same_states(self, stream, ids):
        everything = capture(stream, ids, range(DEPTH + 1))
        for layers in ([2], [DEPTH, 0], [3, 1], [0]):
            some = capture(stream, ids, layers)
            assert set(some) == set(layers)
            for layer, states in some.items():
                assert torch.equal(states, everything[layer])
                assert states.shape == (*ids.shape, 32)

    @pytest.mark.parametrize("layer", [-1, DEPTH + 1])
    def test_there_is_no_other_layer(self, stream, ids, layer):
        message = rf"layer {layer} is outside 0\.\.{DEPTH}"
        with pytest.raises(LayerRangeError, match=message), at_site(stream, layer, lambda _: None):
            pass
        with pytest.raises(LayerRangeError, match=message):
            capture(stream, ids, [layer])
        with pytest.raises(LayerRangeError, match=message), skipping_below(stream, layer):
            pass
        assert no_hooks(stream)


def no_hooks(stream: ResidualStream) -> bool:
    """Whether none of ours is left; transformers keeps some of its own once it was asked for hidden states."""
    hooks = [hook for block in stream.blocks for kind in (block._forward_hooks, block._forward_pre_hooks)
             for hook in kind.values()]  # fmt: skip
    return not any(hook.__module__ == "featstore.models.residual" for hook in hooks)


class TestStoppingEarly:
    @pytest.mark.parametrize("last", range(DEPTH + 1))
    def test_blocks_after_the_last_layer_the_norm_and_the_head_never_run(self, model, stream, ids, last):
        counts: dict[str, int] = {}
        handles = [counted(block, counts, str(i)) for i, block in enumerate(stream.blocks)]
        # Attention is counted apart: the pass is left before or inside a block's own hooks.
        handles += [counted(next(block.children()), counts, f"in {i}") for i, block in enumerate(stream.blocks)]
        handles.append(counted(model.lm_head, counts, "head"))
        final = model.get_decoder().norm if hasattr(model.get_decoder(), "norm") else model.get_decoder().ln_f
        handles.append(counted(final, counts, "norm"))
        try:
            capture(stream, ids, [0, last] if last else [0])
        finally:
            for handle in handles:
                handle.remove()
        assert [counts.get(f"in {i}", 0) for i in range(DEPTH)] == [1] * last + [0] * (DEPTH - last)
        assert "head" not in counts
        assert "norm" not in counts

    def test_nothing_is_left_behind(self, model, stream, ids):
        before = logits(model, ids)
        capture(stream, ids, [0, DEPTH])
        assert no_hooks(stream)
        assert torch.equal(logits(model, ids), before)

    def test_hooks_go_when_the_pass_fails(self, stream, ids):
        def broken(_):
            raise RuntimeError("in the hook")

        with (
            pytest.raises(RuntimeError, match="in the hook"),
            at_site(stream, 2, broken),
            torch.inference_mode(),
        ):
            stream.decoder(input_ids=ids)
        with pytest.raises(IndexError):
            capture(stream, torch.full((1, 3), VOCABULARY), [0, DEPTH])
        assert no_hooks(stream)


class TestInjection:
    @pytest.mark.parametrize("layer", range(DEPTH + 1))
    def test_a_models_own_states_leave_its_logits_bit_identical(self, model, stream, ids, layer):
        own = capture(stream, ids, [layer])[layer]
        seen = []

        def replace(hidden):
            seen.append(hidden.shape)
            return own.clone()

        with at_site(stream, layer, replace):
            assert not no_hooks(stream)
            injected = logits(model, ids)
        assert seen == [own.shape]
        assert torch.equal(injected, logits(model, ids))

    @pytest.mark.parametrize("layer", range(DEPTH + 1))
    def test_other_states_do_not(self, model, stream, ids, layer):
        own = capture(stream, ids, [layer])[layer]
        with at_site(stream, layer, lambda hidden: own.flip(0)):
            injected = logits(model, ids)
        torch.testing.assert_close(injected, logits(model, ids.flip(0)))
        assert (injected - logits(model, ids)).abs().max() > 0.1

    def test_a_function_that_returns_nothing_only_looks(self, model, stream, ids):
        with at_site(stream, 1, lambda _: None), at_site(stream, DEPTH, lambda _: None):
            assert torch.equal(logits(model, ids), logits(model, ids))

    def test_what_is_injected_at_k_is_what_is_captured_at_k_and_moves_what_comes_after(self, stream, ids):
        plain = capture(stream, ids, range(DEPTH + 1))
        for layer in range(DEPTH + 1):
            with at_site(stream, layer, lambda hidden: hidden + 1):
                changed = capture(stream, ids, range(DEPTH + 1))
            for k in range(DEPTH + 1):
                if k < layer:
                    assert torch.equal(changed[k], plain[k])
                elif k == layer:
                    assert torch.equal(changed[k], plain[k] + 1)
                else:
                    assert not torch.allclose(changed[k], plain[k], atol=1e-3)

    @pytest.mark.parametrize("layer", range(DEPTH + 1))
    def test_skipping_the_blocks_below_is_bit_identical(self, model, stream, skipping, ids, layer):
        own = capture(stream, ids, [layer])[layer]
        counts: dict[str, int] = {}
        handles = [counted(next(block.children()), counts, str(i)) for i, block in enumerate(stream.blocks)]
        other = own.flip(1).contiguous()
        results = []
        for states in (own, other):
            with at_site(stream, layer, lambda _, states=states: states):
                full = logits(model, ids)
                counts.clear()
                with skipping_below(skipping, layer):
                    results.append((full, logits(model, ids)))
                assert counts == {str(i): 1 for i in range(layer, DEPTH)}
        for handle in handles:
            handle.remove()
        for full, skipped in results:
            assert torch.equal(full, skipped)
        assert not torch.equal(results[0][0], results[1][0])
        assert not any("forward" in vars(block) for block in stream.blocks)

    def test_where_that_was_not_seen_every_block_runs(self, model, stream, ids):
        seen = replace(stream, skips=frozenset([1, 3]))
        counts: dict[str, int] = {}
        handles = [counted(next(block.children()), counts, str(i)) for i, block in enumerate(stream.blocks)]
        for layer in range(DEPTH + 1):
            counts.clear()
            with skipping_below(seen, layer):
                assert any("forward" in vars(block) for block in stream.blocks) == (layer in seen.skips)
                logits(model, ids)
            assert counts == {str(i): 1 for i in range(layer if layer in seen.skips else 0, DEPTH)}, layer
        for handle in handles:
            handle.remove()

    def test_skipping_gives_a_wrapped_forward_back(self, skipping, ids):
        block = skipping.blocks[0]
        original = block.forward

        def wrapped(*args, **kwargs):
            return original(*args, **kwargs)

        block.forward = wrapped
        try:
            with skipping_below(skipping, 2):
                assert block.forward is not wrapped
            assert block.forward is wrapped
        finally:
            del block.forward


class TestPadding:
    def test_right_padding_does_not_change_the_states_of_real_tokens(self, stream, ids):
        for length in (1, 4, 9):
            alone = capture(stream, ids[:1, :length], range(DEPTH + 1))
            padded = ids.clone()
            padded[0, length:] = 0
            batched = capture(stream, padded, range(DEPTH + 1))
            for layer in range(DEPTH + 1):
                torch.testing.assert_close(batched[layer][:1, :length], alone[layer], rtol=1e-4, atol=1e-5)

    def test_it_does_not_even_matter_what_the_padding_is(self, stream, ids):
        one, two = ids.clone(), ids.clone()
        one[0, 9:], two[0, 9:] = 0, 57
        a, b = capture(stream, one, [DEPTH])[DEPTH], capture(stream, two, [DEPTH])[DEPTH]
        assert torch.equal(a[0, :9], b[0, :9])
        assert not torch.allclose(a[0, 9:], b[0, 9:], atol=1e-2)


def test_the_sliding_window_is_applied_without_a_mask_from_us(ids):
    """A token sees the last WINDOW tokens in the first block, itself included, and no earlier one."""
    torch.manual_seed(0)
    stream = residual_stream(BUILDERS["mistral"]().eval())
    other = ids.clone()
    other[:, 3] = (other[:, 3] + 5) % VOCABULARY
    a, b = capture(stream, ids, [1])[1], capture(stream, other, [1])[1]
    moved = (a - b).abs().amax(dim=(0, 2)) > 1e-7
    assert moved.tolist() == [3 <= position < 3 + WINDOW for position in range(ids.shape[1])]
