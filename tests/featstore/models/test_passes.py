"""Passes that go on from what was read: alone, in branches, with chosen rows, beside padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from featstore.errors import UnsupportedArchitectureError
from featstore.models.loading import load_model
from featstore.models.passes import Passes
from featstore.models.references import ModelSpec
from featstore.models.residual import ResidualStream
from featstore.models.stack import residual_stream

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
