"""What a model remembers, under any name and of any kind: found, counted, copied, chosen from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import StaticCache
from transformers.cache_utils import DynamicCache

from featstore.models.caches import (
    cache_of,
    copied,
    grows,
    recurrent_blocks,
    returned_cache,
    seen,
    selected,
    shared,
    stored,
)
from featstore.models.stack import ordinary_ids, residual_stream
from tests.support.tiny_models import small


@torch.inference_mode()
def read(name: str, tokens: int = 12) -> tuple[str, Any]:
    """The cache of a model that has read two rows, and its name."""
    model = small(name)
    return returned_cache(model(input_ids=ordinary_ids(model, 2, tokens, seed=3), use_cache=True))


#: The name under which a model gives its cache back, and the blocks that keep more than keys and values.
KEPT = {
    "llama": ("past_key_values", []),
    "gpt_neox": ("past_key_values", []),
    "mamba": ("cache_params", [0, 1, 2, 3]),
    "bamba": ("past_key_values", [0, 2]),
    "lfm2": ("past_key_values", [0, 1, 3]),
    "qwen3_5_text": ("past_key_values", [0, 1, 2]),
    "rwkv": ("state", []),
    "openai-gpt": ("", []),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_cache_is_found_under_its_name_and_says_what_it_keeps(name: str) -> None:
    called, past = read(name)
    assert (called, recurrent_blocks(past)) == KEPT[name]
    assert (past is None) == (name == "openai-gpt")
    # Recurrent states alone do not count what they have read.
    assert seen(past) == {"mamba": None, "rwkv": None, "openai-gpt": 0}.get(name, 12)
    assert grows(past) == (name in ("llama", "gpt_neox"))


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "bloom", "mamba", "bamba"])
def test_blocks_are_given_the_cache_under_any_name_and_it_is_found_by_its_type(name: str) -> None:
    # gpt_neox calls it layer_past, mamba cache_params.
    model, given = small(name), []
    block = residual_stream(model).blocks[1]
    handle = block.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(cache_of([*args, *kwargs.values()])), with_kwargs=True
    )
    with torch.inference_mode():
        past = returned_cache(model(input_ids=ordinary_ids(model, 1, 3), use_cache=True))[1]
        model(input_ids=ordinary_ids(model, 1, 3), use_cache=False)
    handle.remove()
    assert given[0] is past
    assert seen(given[1]) == 0


def test_the_first_cache_counts_and_other_arguments_do_not() -> None:
    past = DynamicCache()
    assert cache_of([torch.zeros(2), None, {"a": 1}, past, DynamicCache()]) is past
    assert cache_of({"attention_mask": None, "layer_past": past}) is past
    counted = SimpleNamespace(get_seq_length=lambda: 3)
    assert cache_of([counted]) is counted
    assert seen(counted) == 3
    assert cache_of([torch.zeros(2), "x"]) is None
    assert cache_of({}) is None


def test_a_sliding_window_holds_fewer_keys_than_it_has_seen() -> None:
    # Every second block of the tiny Gemma 2 has a window of eight tokens, and holds the keys of seven before the next.
    _, past = read("gemma2", 20)
    assert seen(past) == 20
    assert {stored(past, block) for block in range(4)} == {7, 20}
    _, fresh = read("llama", 1)
    assert stored(fresh, 0) == 1
    assert stored(None, 0) == stored(fresh, 99) == stored(DynamicCache(), 0) == 0
    # Blocks of linear attention have no keys.
    _, hybrid = read("qwen3_5_text")
    assert [stored(hybrid, block) for block in range(4)] == [0, 0, 0, 12]


def contents(value: Any) -> list[torch.Tensor]:
    """All tensors of a cache, as copies."""
    if isinstance(value, torch.Tensor):
        return [value.clone()]
    if isinstance(value, dict):
        return [tensor for each in value.values() for tensor in contents(each)]
    if isinstance(value, (list, tuple)):
        return [tensor for each in value for tensor in contents(each)]
    return contents(vars(value)) if hasattr(value, "__dict__") and not isinstance(value, type) else []


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@torch.inference_mode()
def test_a_cache_that_grows_is_shared_without_a_copy(name: str) -> None:
    _, past = read(name)
    assert grows(past)
    other, before = shared(past), contents(past)
    assert other.layers[0].keys is past.layers[0].keys
    model = small(name)
    model(input_ids=ordinary_ids(model, 2, 3), past_key_values=other, use_cache=True)
    assert (seen(past), seen(other)) == (12, 15)
    assert all(torch.equal(a, b) for a, b in zip(before, contents(past), strict=True))


@pytest.mark.parametrize("name", ["qwen3_5_text", "lfm2", "bamba", "rwkv", "mamba"])
@torch.inference_mode()
def test_a_copy_keeps_what_is_written_in_place_apart(name: str) -> None:
    called, past = read(name)
    assert not grows(past)
    before = contents(past)
    model, other = small(name), copied(past)
    model(input_ids=ordinary_ids(model, 2, 1), **{called: other}, use_cache=True)
    assert all(torch.equal(a, b) for a, b in zip(before, contents(past), strict=True))
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(before, contents(other), strict=True))


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_5_text", "lfm2", "bamba", "mamba"])
@torch.inference_mode()
def test_chosen_rows_are_those_rows_each_as_often_as_wished(name: str) -> None:
    called, past = read(name)
    model, rows = small(name), torch.tensor([1, 0, 1])
    new = ordinary_ids(model, 3, 1, seed=8)
    both = model(input_ids=new[:2], **{called: copied(past)}, use_cache=True).logits
    turned = model(input_ids=new[:2].flip(0), **{called: copied(past)}, use_cache=True).logits.flip(0)
    found = model(input_ids=new[[0, 1, 1]], **{called: selected(copied(past), rows)}, use_cache=True).logits
    torch.testing.assert_close(found[:2], turned, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[2], both[1], rtol=1e-3, atol=1e-4)


def test_rows_of_plain_structures_are_chosen_wherever_they_are() -> None:
    tensor = torch.arange(6).reshape(2, 3)
    past = SimpleNamespace(states=[tensor, (tensor + 10, None)], by_name={"a": tensor}, count=torch.tensor(4), name="x")
    rows = torch.tensor([1, 1, 0])
    found = selected(past, rows)
    assert torch.equal(found.states[0], tensor[rows])
    assert torch.equal(found.states[1][0], tensor[rows] + 10)
    assert found.states[1][1] is None
    assert torch.equal(found.by_name["a"], tensor[rows])
    assert (found.count, found.name) == (torch.tensor(4), "x")


def test_a_recurrent_cache_that_was_made_beforehand_has_seen_nothing_yet() -> None:
    model: Any = small("mamba")
    past = DynamicCache(config=model.config)
    assert seen(past) == 0
    with torch.inference_mode():
        model(input_ids=ordinary_ids(model, 1, 3), cache_params=past, use_cache=True)
    assert seen(past) is None


def test_a_cache_of_fixed_size_does_not_grow() -> None:
    model: Any = small("llama")
    assert not grows(StaticCache(config=model.config, max_cache_len=8))
    assert not grows(None)
    assert not grows(DynamicCache())
