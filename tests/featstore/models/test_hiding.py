"""What is hidden reaches nothing: any prompt gives the same answer, and so does one with its hidden tokens deleted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from featstore.errors import SpecError, UnsupportedArchitectureError
from featstore.models import residual as sites
from featstore.models.hiding import Progress, _Hook, hiding, with_neutral_start
from featstore.models.injection import Injection, aligned, inject, last
from featstore.models.layout import Axes, Continuing
from featstore.models.loading import load_model
from featstore.models.passes import Passes
from featstore.models.probe.prove import Needs, prove
from featstore.models.references import ModelSpec
from featstore.models.stack import ordinary_ids, residual_stream
from tests.support.architectures.building import build

TOKENS = 40
#: Ordinary places, some of them near the end and the last one, which gives the first answer.
PLACES = [[2, 3, 11, 25, 30, 39], [5, 20, 21, 38, 39]]


@pytest.fixture(scope="module", params=["llama-sdpa", "llama-eager", "mistral-sdpa", "mistral-eager"])
def model(request: pytest.FixtureRequest, tiny_llama: Path, tiny_mistral: Path) -> Any:
    name, attention = request.param.split("-")
    path = {"llama": tiny_llama, "mistral": tiny_mistral}[name]
    return load_model(ModelSpec(name, str(path)), device="cpu", dtype="float32", attention=attention)


def tokens(model: Any, count: int, seed: int, rows: int = 2) -> torch.Tensor:
    return torch.randint(5, model.config.vocab_size, (rows, count), generator=torch.Generator().manual_seed(seed))


def prompt(model: Any, seed: int = 3) -> torch.Tensor:
    """A prompt without a start token: its first token is a word, another one under another seed."""
    ids = tokens(model, TOKENS, seed)
    assert (ids[:, 0] != residual_stream(model).start).all()
    return ids


def injection_into(model: Any, ids: torch.Tensor, layer: int, keep: str, places: Any = None) -> Injection:
    own = sites.capture(residual_stream(model), ids, [layer])[layer]
    at = PLACES if places is None else places
    generator = torch.Generator().manual_seed(layer)
    states = [2 * torch.randn(len(row), own.shape[2], generator=generator) for row in at]
    return aligned(own, states, at, layer=layer, keep=keep)


@torch.inference_mode()
def answers(model: Any, ids: torch.Tensor, injection: Injection | None, later: list[torch.Tensor]) -> torch.Tensor:
    """Logits of the prompt's last token and of all that comes after, pass by pass through the cache."""
    stream = residual_stream(model)
    context = hiding(stream, 0, *[torch.ones(2, TOKENS, dtype=torch.bool)] * 2)
    if injection is not None:
        context = inject(stream, injection, whole=False)
    with context:
        output = model(input_ids=ids, use_cache=True)
        parts = [output.logits[:, -1:]]
        for new in later:
            output = model(input_ids=new, past_key_values=output.past_key_values, use_cache=True)
            parts.append(output.logits)
    return torch.cat(parts, dim=1)


def layers(model: Any) -> range:
    return range(residual_stream(model).depth + 1)


def later(model: Any, *counts: int) -> list[torch.Tensor]:
    return [tokens(model, count, 50 + i) for i, count in enumerate(counts)]


def test_two_prompts_with_the_same_states_give_the_same_answer(model: Any) -> None:
    one, two = prompt(model, 3), prompt(model, 4)
    assert (one[:, 0] != two[:, 0]).all()
    new = later(model, 1, 3, 1)
    for layer in layers(model):
        hidden, kept = (
            [answers(model, ids, injection_into(model, ids, layer, keep), new) for ids in (one, two)]
            for keep in ("hide", "own")
        )
        torch.testing.assert_close(hidden[0], hidden[1], rtol=0, atol=1e-5)
        # The answers right after the prompt: a short sliding window soon forgets it by itself.
        change = (kept[0] - kept[1])[:, 0 if layer < layers(model)[-1] else 1].abs().amax(dim=-1)
        assert (change > 1e-3).all(), layer


def test_the_first_word_is_hidden_to_the_bit(model: Any) -> None:
    # Nothing but the first token differs, so every row that is computed is the same row.
    one, two = prompt(model), prompt(model)
    two[:, 0] += 1
    new = later(model, 1, 3, 1)
    stream = residual_stream(model)
    for layer in layers(model):
        cached, in_one_pass = [], []
        for ids in (one, two):
            injection = injection_into(model, ids, layer, "hide")
            cached.append(answers(model, ids, injection, new))
            with torch.inference_mode(), inject(stream, injection, whole=True):
                in_one_pass.append(model(input_ids=ids, use_cache=False).logits)
        reading = injection.replaced | injection.start
        assert torch.equal(cached[0], cached[1]), layer
        assert torch.equal(in_one_pass[0][reading], in_one_pass[1][reading]), layer
        # With `own` the first word is read; a short sliding window forgets it before the prompt ends.
        kept = []
        for ids in (one, two):
            with torch.inference_mode(), inject(stream, injection_into(model, ids, layer, "own"), whole=True):
                kept.append(model(input_ids=ids, use_cache=False).logits[injection.replaced])
        assert torch.equal(kept[0], kept[1]) == (layer == layers(model)[-1]), layer


def test_the_first_token_of_a_padded_prompt_is_replaced_where_it_stands(model: Any) -> None:
    stream, ids = residual_stream(model), prompt(model)
    padding = torch.zeros_like(ids, dtype=torch.bool)
    padding[1, :4] = True
    start = Injection(1, torch.zeros(2, TOKENS, 1), padding & False, "hide", padding).start
    args, kwargs, foreign = with_neutral_start(stream, (), {"input_ids": ids}, start)
    wanted = ids.clone()
    wanted[0, 0] = wanted[1, 4] = stream.start
    assert args == ()
    assert torch.equal(kwargs["input_ids"], wanted)
    assert torch.equal(foreign, start)
    # As a positional argument, with more tokens after those of the prompt, and where it is the start token already.
    longer = torch.cat([wanted, ids], dim=1)
    (given,), _, foreign = with_neutral_start(stream, (longer,), {}, start)
    assert torch.equal(given, longer)
    assert not foreign.any()
    embeddings = model.get_input_embeddings()
    _, kwargs, foreign = with_neutral_start(stream, (), {"inputs_embeds": embeddings(ids)}, start)
    assert torch.equal(kwargs["inputs_embeds"], embeddings(wanted))
    assert torch.equal(foreign, start)
    with pytest.raises(SpecError, match="neither input_ids nor inputs_embeds"):
        with_neutral_start(stream, (), {"attention_mask": ids}, start)


def test_attention_sinks_that_took_no_state_are_hidden_too(model: Any) -> None:
    # The token made to be the tiny model's sink, Llama's newline or Mistral's start token, and a start token.
    loudest = int(model.get_input_embeddings().weight.norm(dim=1).argmax())
    sinks, new = torch.tensor([loudest, 1]), later(model, 1, 3)
    one, two = prompt(model, 3), prompt(model, 3)
    two[:, [1, 12]] = sinks[None]
    assert not {1, 12} & {place for row in PLACES for place in row}
    stream = residual_stream(model)
    for layer in layers(model):
        size = sites.capture(stream, two, [layer])[layer].norm(dim=-1)
        if layer == 0:
            assert (size[:, [1, 12]].amax(dim=1) > 5 * size.median()).all()
        found = [answers(model, ids, injection_into(model, ids, layer, "hide"), new) for ids in (one, two)]
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


def test_what_is_injected_is_not_hidden(model: Any) -> None:
    ids, new = prompt(model), later(model, 1, 2)
    for layer in layers(model):
        injection = injection_into(model, ids, layer, "hide")
        clean = answers(model, ids, injection, new)
        for row, place in ((0, 30), (1, 38)):
            changed = injection.hidden.clone()
            changed[row, place] += 1.0
            other = Injection(layer, changed, injection.replaced, "hide")
            difference = (answers(model, ids, other, new) - clean).abs().amax(dim=(1, 2))
            if layer < layers(model)[-1]:
                assert difference[row] > 1e-4, layer
            # Rows do not see each other.
            assert difference[1 - row] == 0


@torch.inference_mode()
def deleted(model: Any, states: torch.Tensor, places: list[int], layer: int, new: torch.Tensor) -> Any:
    """The answers by another road: no cache, no prompt, nothing masked but the future; only positions are given.

    In front of all stands the model's start token, whatever word the prompt began with.
    """
    decoder, blocks = model.model, residual_stream(model).blocks
    start = torch.tensor([model.config.bos_token_id])
    window = getattr(model.config, "sliding_window", None)

    def run(hidden: torch.Tensor, positions: torch.Tensor, some: Any) -> torch.Tensor:
        apart = positions[:, None] - positions[None]
        sees = (apart >= 0) & (apart < (window or 1 << 30))
        mask = torch.where(sees, 0.0, torch.finfo(torch.float32).min)[None, None]
        angles = decoder.rotary_emb(hidden, position_ids=positions[None])
        for block in some:
            hidden = block(hidden, attention_mask=mask, position_ids=positions[None], position_embeddings=angles)
        return hidden

    after = torch.arange(TOKENS, TOKENS + len(new))
    first = torch.cat([torch.zeros(1, dtype=torch.long), after])
    hidden = run(decoder.embed_tokens(torch.cat([start, new]))[None], first, blocks[:layer])
    hidden = torch.cat([hidden[:, :1], states[None], hidden[:, 1:]], dim=1)
    positions = torch.cat([first[:1], torch.tensor(places), after])
    hidden = run(hidden, positions, blocks[layer:])
    return model.lm_head(decoder.norm(hidden))[0, len(places) :]


def test_hiding_is_the_same_as_deleting(model: Any) -> None:
    ids, new = prompt(model), later(model, 1, 4, 1, 1)
    for layer in layers(model):
        injection = injection_into(model, ids, layer, "hide")
        found = answers(model, ids, injection, new)
        for row, places in enumerate(PLACES):
            wanted = deleted(model, injection.hidden[row, places], places, layer, torch.cat(new, dim=1)[row])
            torch.testing.assert_close(found[row], wanted, rtol=1e-4, atol=1e-4)


def test_a_hidden_position_still_reads_itself(model: Any) -> None:
    ids, row, places = prompt(model), 0, [2, 3, 11, 25, 27]
    for layer in layers(model):
        injection = injection_into(model, ids, layer, "hide")
        assert injection.replaced[row, places].tolist() == [True] * 4 + [False]
        with torch.inference_mode(), inject(residual_stream(model), injection, whole=True):
            found = model(input_ids=ids, use_cache=False).logits[row, 27]
        states, nothing = injection.hidden[row, places], ids[row, :0]
        wanted = deleted(model, states, places, layer, nothing)[0]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_one_pass_over_prompt_and_answer_is_the_same_as_many(model: Any) -> None:
    stream, new = residual_stream(model), later(model, 1, 4, 1)
    ids = prompt(model)
    ids[:, 0] = stream.start
    everything = torch.cat([ids, *new], dim=1)
    for layer in layers(model):
        injection = injection_into(model, ids, layer, "hide")

        def put(hidden: torch.Tensor, injection: Injection = injection) -> torch.Tensor:
            return torch.cat([injection.hidden, hidden[:, TOKENS:]], dim=1)

        readable = injection.replaced | injection.start
        with (
            torch.inference_mode(),
            sites.at_site(stream, layer, put),
            hiding(stream, layer, readable, injection.start),
        ):
            logits = model(input_ids=everything, use_cache=False).logits
        torch.testing.assert_close(logits[:, TOKENS - 1 :], answers(model, ids, injection, new), rtol=1e-4, atol=1e-4)


def test_a_text_that_is_passed_again_and_again_is_the_same_as_a_cached_one(model: Any) -> None:
    # Without a cache the prompt is the beginning of every pass, and takes its states in each.
    stream = replace(residual_stream(model), continuing=Continuing(kind="recomputed"))
    ids, new = prompt(model), later(model, 1, 4, 1)
    for layer in layers(model):
        injection = injection_into(model, ids, layer, "hide")
        wanted, given, found = answers(model, ids, injection, new), ids, []
        with torch.inference_mode(), inject(stream, injection, whole=False):
            for more in (ids[:, :0], *new):
                given = torch.cat([given, more], dim=1)
                logits = model(input_ids=given, use_cache=False).logits
                found.append(logits[:, -max(1, more.shape[1]) :])
        torch.testing.assert_close(torch.cat(found, dim=1), wanted, rtol=1e-4, atol=1e-4)


def test_a_replaced_start_token_is_read_as_replaced(model: Any) -> None:
    stream, ids, new = residual_stream(model), prompt(model), later(model, 1, 2)
    places = [[0, 10, 39], [0, 39]]
    injection = injection_into(model, ids, 1, "hide", places)
    torch.testing.assert_close(
        answers(model, ids, injection, new), answers(model, prompt(model, 4), injection, new), rtol=0, atol=1e-5
    )
    changed = injection.hidden.clone()
    changed[:, 0] += 1.0
    logits = []
    for hidden in (injection.hidden, changed):
        with torch.inference_mode(), inject(stream, Injection(1, hidden, injection.replaced, "hide"), whole=True):
            logits.append(model(input_ids=ids, use_cache=False).logits)
    # At a place that a short sliding window lets read it.
    assert (logits[0] - logits[1])[0, 10].abs().max() > 1e-4


def test_injected_positions_do_not_read_hidden_ones_in_the_prompts_own_pass(model: Any) -> None:
    ids = prompt(model)
    stream = residual_stream(model)
    injection = injection_into(model, ids, 1, "hide")
    changed = injection.hidden.clone()
    changed[:, 10] += 5.0
    assert not injection.replaced[:, 10].any()
    for whole in (True, False):
        logits = []
        for hidden in (injection.hidden, changed):
            with (
                torch.inference_mode(),
                inject(stream, Injection(1, hidden, injection.replaced, "hide"), whole=whole),
            ):
                logits.append(model(input_ids=ids, use_cache=not whole).logits)
        difference = (logits[0] - logits[1]).abs().amax(dim=-1)
        assert (difference[injection.replaced] == 0).all()
        assert (difference[:, 10] > 1e-3).all()


def test_with_everything_injected_at_layer_0_there_is_nothing_to_hide(model: Any) -> None:
    ids, new = prompt(model), later(model, 1, 3)
    clean = answers(model, ids, None, new)
    own = sites.capture(residual_stream(model), ids, [0])[0]
    injection = aligned(own, list(own), [range(TOKENS)] * 2, layer=0, keep="hide")
    assert torch.equal(answers(model, ids, injection, new), clean)


def test_a_layer_above_everything_injected_still_hides_the_blocks_below(model: Any) -> None:
    ids, new = prompt(model), later(model, 1, 3)
    clean = answers(model, ids, None, new)
    own = sites.capture(residual_stream(model), ids, [2])[2]
    found = answers(model, ids, aligned(own, list(own), [range(TOKENS)] * 2, layer=2, keep="hide"), new)
    # The prompt's own pass hides nothing, what comes after it does.
    assert torch.equal(found[:, 0], clean[:, 0])
    assert (found[:, 1] - clean[:, 1]).abs().max() > 1e-3


def test_the_last_state_alone_gets_through(model: Any) -> None:
    new = later(model, 1, 2)
    state = torch.randn(2, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    for layer in layers(model):
        found = []
        for ids in (prompt(model, 3), prompt(model, 4)):
            own = sites.capture(residual_stream(model), ids, [layer])[layer]
            found.append(answers(model, ids, last(own, state, layer=layer, keep="hide"), new))
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


def test_padding_goes_along_and_is_no_start_token() -> None:
    own, padding = torch.zeros(2, 4, 3), torch.tensor([[True, True, False, False], [False] * 4])
    for made in (
        aligned(own, [own[0, :1]] * 2, [[3], [0]], layer=1, keep="hide", padding=padding),
        last(own, own[:, 0], layer=1, keep="hide", padding=padding),
    ):
        assert made.padding is not None
        assert torch.equal(made.padding, padding)
        assert made.start.tolist() == [[False, False, True, False], [True, False, False, False]]


def test_hooks_leave_with_the_context(model: Any) -> None:
    ids, new = prompt(model), later(model, 1)
    clean = answers(model, ids, None, new)
    answers(model, ids, injection_into(model, ids, 1, "hide"), new)
    assert torch.equal(answers(model, ids, None, new), clean)
    stream = residual_stream(model)
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in stream.blocks)
    assert not stream.decoder._forward_pre_hooks


def test_a_mask_with_nothing_to_hide_is_left_as_it_is(model: Any) -> None:
    # Another mask would mean another kernel, whose rounding differs.
    everything = torch.ones((2, 4), dtype=torch.bool)
    stream, block, given = residual_stream(model), torch.nn.Identity(), {"attention_mask": None}
    hidden = (torch.zeros(2, 4, 3),)
    assert _Hook(stream, 0, everything, Progress(), below=False)(block, hidden, given) is None
    # Below the layer the whole prompt's pass is overwritten there.
    assert _Hook(stream, 0, everything.tril(), Progress(), below=True)(block, hidden, given) is None
    _, new = _Hook(stream, 0, everything.tril(), Progress(), below=False)(block, hidden, given)
    assert new["attention_mask"].shape == (2, 1, 4, 4)


def test_attention_without_a_mask_of_positions_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, stream = prompt(model), residual_stream(model)
    stream.start_state(1)
    monkeypatch.setattr(model.config, "_attn_implementation", "flash_attention_2")
    with (
        pytest.raises(SpecError, match=r"attention 'flash_attention_2' takes no mask .* sdpa or eager"),
        inject(stream, injection_into_own(model, ids), whole=False),
    ):
        pass


def injection_into_own(model: Any, ids: torch.Tensor) -> Injection:
    own = torch.zeros(2, TOKENS, model.config.hidden_size)
    return last(own, own[:, 0], layer=1, keep="hide")


def test_another_batch_or_cache_is_refused(model: Any) -> None:
    from transformers import StaticCache

    ids, stream = prompt(model), residual_stream(model)
    injection = injection_into(model, ids, 1, "hide")
    with torch.inference_mode(), inject(stream, injection, whole=False):
        past = model(input_ids=ids, use_cache=True).past_key_values
        past.batch_select_indices(torch.tensor([0]))
        with pytest.raises(SpecError, match="a pass of 1 rows with an injection of 2"):
            model(input_ids=ids[:1, :1], past_key_values=past)
        fixed = StaticCache(config=model.config, max_cache_len=64)
        with pytest.raises(UnsupportedArchitectureError, match="a cache that grows"):
            model(input_ids=ids, past_key_values=fixed, use_cache=True)


def test_blocks_that_get_no_mask_are_named() -> None:
    class Block(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states

    block = Block()
    blocks = torch.nn.ModuleList([block])
    stream = sites.ResidualStream(
        torch.nn.Module(), torch.nn.Module(), blocks, "layers", Axes(0, 1, (3,)), torch.float32
    )
    stream.decoder.config = SimpleNamespace(_attn_implementation="sdpa")
    flags = torch.tensor([[True, False]])
    with (
        hiding(stream, 0, flags, flags),
        pytest.raises(UnsupportedArchitectureError, match="Block gets no attention_mask"),
    ):
        block(torch.zeros(1, 2, 3))


@torch.inference_mode()
def test_blocks_that_fill_several_layers_of_the_cache_hide_without_a_mask_of_their_own() -> None:
    """A longcat block has two attentions: the cache layer of its number may hold the tokens of the pass already."""
    double = build("longcat_flash")
    stream = residual_stream(double)
    said = []
    for seed in (1, 2):
        ids, more = tokens(double, 12, seed), tokens(double, 5, 9)
        own = sites.capture(stream, ids, [2])[2]
        states = torch.randn(2, 2, own.shape[2], generator=torch.Generator().manual_seed(0))
        with inject(stream, aligned(own, list(states), [[3, 11]] * 2, layer=2, keep="hide"), whole=False):
            passes = Passes(stream)
            said.append(torch.cat([passes.read(ids), passes.read(more[:, :3], keep=3), passes.read(more[:, 3:])], 1))
    assert torch.allclose(*said, rtol=0, atol=1e-5 * float(said[0].abs().max()))
    assert said[0].abs().max() > 0


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        # The last two blocks read keys that earlier ones keep, of a window and of the whole text.
        ("gemma4_unified_text", 2),
        # Each block fills two layers of the cache.
        ("longcat_flash", 1),
        # Its mask is True where nothing is seen.
        ("mpt", 1),
        # Windows, and none.
        ("gemma3_text", 1),
    ],
)
@pytest.mark.parametrize("padding", [0, 3])
def test_keys_that_lie_elsewhere_are_hidden_token_by_token(name: str, layer: int, padding: int) -> None:
    model = build(name)
    stream = prove(model, Needs(continuing=True)).stream
    one, two, third = (ordinary_ids(model, 1, 14, seed=seed) for seed in (1, 2, 3))
    assert not bool((one == two).all())
    states = sites.capture(stream, third, [layer])[layer][0, 6:9]
    padded = torch.zeros((1, 14), dtype=torch.bool)
    padded[:, :padding] = True
    kept = {}
    for keep in ("own", "hide"):
        said = []
        for ids in (one, two):
            own = sites.capture(stream, ids, [layer])[layer]
            with inject(
                stream, aligned(own, [states], [[6, 9, 13]], layer=layer, keep=keep, padding=padded), whole=False
            ):
                passes = Passes(stream)
                read = [passes.read(ids, padded if padding else None)]
                read += [passes.read(ordinary_ids(model, 1, count, seed=count), keep=count) for count in (1, 1, 3, 1)]
            said.append(torch.cat(read, dim=1))
        kept[keep] = float((said[0] - said[1]).abs().max())
    assert kept["hide"] < 1e-5 * float(said[0].abs().max())
    assert kept["own"] > 0.01


def test_a_block_whose_keys_are_not_known_is_named() -> None:
    model = build("gemma4_unified_text")
    stream = residual_stream(model)
    now, some = Progress(begun=14, held=(7, 14, 7, 14, 0, 0)), torch.tensor([[True, *[False] * 13]])
    hook, given = _Hook(stream, 5, some, now, below=False), {"attention_mask": None}
    hidden = (torch.zeros(1, 1, stream.width),)
    _, narrowed = hook(stream.blocks[5], hidden, given)
    # A block of its kind holds the whole text.
    assert narrowed["attention_mask"].shape[-1] == 15
    model.config.layer_types = None
    with pytest.raises(UnsupportedArchitectureError, match="hold 7 or 14 keys, so nothing can be hidden from it"):
        hook(stream.blocks[5], hidden, given)
