"""Whether the stream is all that later blocks know: exactly 0 where it is, a figure where it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from featstore.models.layout import Axes
from featstore.models.probe import injecting
from featstore.models.probe.injecting import Texts, two_texts
from featstore.models.residual import ResidualStream, at_site
from featstore.models.stack import residual_stream
from featstore.models.verdict import LayerVerdict
from tests.support.architectures.building import build
from tests.support.tiny_models import small

#: Layers that leak: side channels past the stream.
LEAKS = {
    "llama": (),
    "gpt2": (),
    "gpt_neox": (),
    "gemma3": (),
    "phi3@longrope": (),
    "bamba": (),
    "mamba": (),
    "lfm2": (),
    "qwen3_5_text": (),
    "openai-gpt": (),
    # Experts chosen by the token's id in the first two blocks.
    "deepseek_v4": (0, 1),
    "deepseek_v4@window": (),
    # Embeddings that every block has for itself, and keys of earlier blocks.
    "gemma3n_text": (0, 1, 2, 3, 4, 5),
    "gemma4_text": (0, 1, 2, 3, 4, 5),
    # The embedding that shared blocks read again, up to the last of them.
    "zamba": (0, 1, 2, 3, 4),
}
#: Layers below which blocks may not be left out: those above need what they make.
NEEDED = {"bamba": (1, 2, 3, 4), "gemma3n_text": (3, 4, 5), "gemma4_text": (3, 4, 5), "rwkv": (1, 2, 3, 4)}


def verdicts(stream: ResidualStream) -> dict[int, LayerVerdict]:
    texts = two_texts(stream)
    return {layer: injecting.test_injecting(stream, texts, layer) for layer in range(stream.depth + 1)}


@pytest.mark.parametrize("name", LEAKS)
def test_what_leaks_and_what_does_not(name: str) -> None:
    found = verdicts(residual_stream(small(name)))
    for layer, verdict in found.items():
        assert verdict.leak is not None
        # Self-injection cannot see a side channel.
        assert verdict.self_identical
        if layer in LEAKS[name]:
            assert verdict.leak > 0.01, layer
        else:
            assert verdict.leak == 0, layer


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mamba", "deepseek_v4", *NEEDED])
def test_blocks_are_left_out_where_nobody_needs_them(name: str) -> None:
    found = verdicts(residual_stream(small(name)))
    assert tuple(layer for layer, verdict in found.items() if not verdict.skips) == NEEDED.get(name, ())


def test_the_two_texts_have_no_token_in_common() -> None:
    texts = two_texts(residual_stream(small("llama")))
    assert texts.ids[0].shape == texts.ids[1].shape == (1, 16)
    assert not (texts.ids[0] == texts.ids[1]).any()
    assert texts.repeats == 0
    with torch.inference_mode():
        for ids, logits in zip(texts.ids, texts.logits, strict=True):
            assert torch.equal(small("llama")(ids).logits, logits)


def test_the_leak_is_the_part_of_the_way_back_to_the_other_text() -> None:
    # A channel of known width: the last block also reads a tenth of the token's own vector.
    model = build("llama")
    embedded: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda *given: embedded.append(given[2]))
    last: Any = model.model.layers[-1]  # type: ignore[index, union-attr]
    last.register_forward_hook(lambda _, __, output: output + 0.1 * embedded[-1])
    stream = residual_stream(model)
    texts = two_texts(stream)
    for layer in (0, 2, stream.depth):
        found = injecting.test_injecting(stream, texts, layer)
        with torch.inference_mode(), at_site(stream, layer, lambda _, layer=layer: texts.streams[0][layer]):
            swapped = model(texts.ids[1]).logits
        wanted = (swapped - texts.logits[0]).abs().max() / (texts.logits[1] - texts.logits[0]).abs().max()
        assert found.self_identical
        assert found.leak == pytest.approx(float(wanted), rel=1e-5)
        # At L our hook comes after the channel, and takes the place of what it added.
        assert (found.leak == 0) == (layer == stream.depth)


def test_a_stream_that_comes_back_otherwise_is_not_identical(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = residual_stream(small("gemma3n_text"))
    texts = two_texts(stream)
    assert injecting.test_injecting(stream, texts, 2).self_identical
    original = Axes.native
    # Two streams that change places, and a rounding to half precision.
    for change in (lambda native: native.roll(1, dims=0), lambda native: native.bfloat16().float()):
        monkeypatch.setattr(Axes, "native", lambda self, rows, change=change: change(original(self, rows)))
        found = injecting.test_injecting(stream, texts, 2)
        assert found.self_identical is False
        assert found.skips is False


def test_what_two_equal_passes_differ_by_is_no_leak_and_more_is_one() -> None:
    model, generator = build("llama"), torch.Generator().manual_seed(0)

    def noisy(_: Any, __: Any, output: Any) -> Any:
        output.logits = output.logits + 1e-5 * torch.rand(output.logits.shape, generator=generator)
        return output

    model.register_forward_hook(noisy)
    stream = residual_stream(model)
    texts = two_texts(stream)
    assert 0 < texts.repeats <= 1e-5
    found = injecting.test_injecting(stream, texts, 1)
    assert (found.self_identical, found.leak, found.skips) == (True, 0, True)
    last: Any = model.model.layers[-1]  # type: ignore[index, union-attr]
    embedded: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda *given: embedded.append(given[2]))
    last.register_forward_hook(lambda _, __, output: output + 0.1 * embedded[-1])
    leak = injecting.test_injecting(stream, two_texts(stream), 1).leak
    assert leak is not None
    assert leak > 0.001


def test_logits_that_no_text_moves_tell_nothing() -> None:
    # Both texts say the same: a leak of 0 would mean nothing, and none is claimed.
    stream = residual_stream(small("llama"))
    texts = two_texts(stream)
    flat = Texts(texts.ids, (texts.logits[0],) * 2, texts.streams, 0.0, 0.0)
    assert injecting.test_injecting(stream, flat, 1).leak == 0
    moved = Texts(texts.ids, (texts.logits[0] + 1,) * 2, texts.streams, 0.0, 0.0)
    verdict = injecting.test_injecting(stream, moved, 1)
    assert verdict.leak is None
    assert verdict.self_identical is False
