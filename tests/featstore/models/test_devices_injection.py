"""Under a device map, what is put in, what is hidden and what is continued from the cache give the same bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from featstore.models import residual as sites
from featstore.models.devices import input_device
from featstore.models.injection import aligned, inject
from featstore.models.passes import Passes
from featstore.models.stack import residual_stream
from tests.support import spread as spreads

TOKENS = 12
PLACES = [[2, 5, 9, 11], [1, 8, 10, 11]]


@pytest.fixture(scope="module", params=spreads.BLOCKS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=spreads.MAIN)
def main(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=spreads.SPREADS)
def pair(
    request: pytest.FixtureRequest, family: str, main: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Any]:
    """The streams of the model on one device, and under a map."""
    spec = spreads.save(family, tmp_path_factory.mktemp("spread"))
    models = spreads.plain(spec, main), spreads.spread(spec, request.param, main)
    # Every block may be skipped in these models; the probe finds that out elsewhere.
    return tuple(replace(residual_stream(m), skips=frozenset(range(4))) for m in models)  # type: ignore[return-value]


def prompt(stream: Any) -> torch.Tensor:
    ids = torch.randint(3, 96, (2, TOKENS), generator=torch.Generator().manual_seed(8))
    return ids.to(input_device(stream.model))


def own(stream: Any, layer: int) -> torch.Tensor:
    return sites.capture(stream, prompt(stream), [layer])[layer]


def strange(stream: Any, layer: int, keep: str) -> Any:
    """Other states at some places of the prompt."""
    generator = torch.Generator().manual_seed(layer)
    states = [2 * torch.randn(len(row), stream.width, generator=generator) for row in PLACES]
    return aligned(own(stream, layer), states, PLACES, layer=layer, keep=keep)


@torch.inference_mode()
def whole_pass(stream: Any, injection: Any) -> torch.Tensor:
    with inject(stream, injection, whole=True):
        return stream.model(prompt(stream)).logits.cpu()


@torch.inference_mode()
def continued(stream: Any, injection: Any) -> torch.Tensor:
    """Logits of a prompt, of four more tokens, and of rows in another order after that, all from the cache."""
    new = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    with inject(stream, injection, whole=False):
        passes = Passes(stream)
        parts = [passes.read(prompt(stream)), passes.read(new, keep=4)]
        other = passes.branch(torch.tensor([1, 0]))
        parts += [other.read(new[:, :1]), passes.read(new[:, :1])]
    return torch.cat([part.cpu() for part in parts], dim=1)


def test_own_states_put_back_change_no_bit(pair: tuple[Any, Any]) -> None:
    with torch.inference_mode():
        clean = pair[0].model(prompt(pair[0])).logits.cpu()
    everywhere = [list(range(TOKENS))] * 2
    for layer in range(4):
        for stream in pair:
            states = own(stream, layer)
            back = aligned(states, list(states), everywhere, layer=layer, keep="own")
            assert torch.equal(whole_pass(stream, back), clean)


@pytest.mark.parametrize("keep", ["own", "hide"])
def test_other_states_have_the_same_effect(pair: tuple[Any, Any], keep: str) -> None:
    for layer in range(4):
        plain, mapped = (strange(stream, layer, keep) for stream in pair)
        wanted = whole_pass(pair[0], plain), continued(pair[0], plain)
        assert torch.equal(whole_pass(pair[1], mapped), wanted[0])
        assert torch.equal(continued(pair[1], mapped), wanted[1])
        # The map does not hide that there is an effect.
        with torch.inference_mode():
            assert not torch.equal(wanted[0], pair[0].model(prompt(pair[0])).logits.cpu())
