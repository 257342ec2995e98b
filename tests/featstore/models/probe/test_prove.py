"""What is tested on a model is tested once, aside of whoever is using it, and recorded as far as it was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from featstore.errors import LayerRangeError
from featstore.models import residual as sites
from featstore.models.aside import aside
from featstore.models.probe.prove import Needs, Proven, asked, everything, further, key_of, prove, recalled
from featstore.models.stack import residual_stream
from featstore.models.verdict import Verdict
from tests.support.architectures.building import build

ALL = Needs(continuing=True, layers=(1, 3), hide=True)


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """Passes of a model, as its forward is called."""
    passes: list[int] = []
    forward = model.forward

    def count(*args: Any, **kwargs: Any) -> Any:
        passes.append(1)
        return forward(*args, **kwargs)

    model.forward = count  # type: ignore[method-assign]
    try:
        yield passes
    finally:
        del model.forward


def test_a_model_is_tested_once_in_a_process() -> None:
    model = build("llama")
    first = prove(model, Needs(layers=(1,)))
    assert set(first.verdict.layers) == {"1"}
    assert first.verdict.continuing is None
    with counted(model) as passes:
        again = prove(model, Needs(layers=(1,)))
        assert further(Proven(residual_stream(model), Verdict()), Needs(layers=(1,))).verdict.layers.keys() == {"1"}
    assert not passes
    assert again.verdict == first.verdict
    with counted(model) as passes:
        more = prove(model, ALL)
    assert passes
    assert set(more.verdict.layers) == {"1", "3"}
    assert more.verdict.layers["1"].hide == 0.0
    # A stream that was proven for less knows no less of the model afterwards.
    with counted(model) as passes:
        joined = further(first, ALL)
    assert not passes
    assert joined.verdict == more.verdict
    assert joined.stream.continuing == more.stream.continuing


def test_another_number_type_or_model_is_tested_anew() -> None:
    model = build("llama")
    assert prove(model).verdict.stream_dtype == "float32"
    assert prove(model.double()).verdict.stream_dtype == "float64"
    with counted(other := build("llama")) as passes:
        prove(other)
    assert passes


def test_what_is_remembered_goes_with_the_model() -> None:
    import gc

    from featstore.models.probe import prove as proving

    gc.collect()  # models of earlier tests
    model = build("llama")
    prove(model)
    held = len(proving._REMEMBERED)
    del model
    gc.collect()
    assert len(proving._REMEMBERED) == held - 1


def test_a_verdict_is_recalled_by_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATSTORE_CACHE", str(tmp_path))
    key = key_of(build("llama"), weights="blake3:1", config="c")
    assert key is not None
    assert key_of(build("llama"), weights=None, config="c") is None
    keys = {key_of(build("llama"), weights=w, config=c) for w, c in (("blake3:2", "c"), ("blake3:1", "d"))}
    keys |= {key_of(build("llama").double(), weights="blake3:1", config="c")}
    assert len(keys | {key}) == 4
    found = prove(build("llama"), ALL, key=key)
    assert recalled(key) == found.verdict
    with counted(model := build("llama")) as passes:
        again = prove(model, ALL, key=key)
    # One pass finds the blocks.
    assert len(passes) == 1
    assert again.verdict == found.verdict
    assert again.stream.skips == found.stream.skips


def test_a_result_records_what_its_command_asked_for() -> None:
    model = build("llama")
    whole = prove(model, everything(residual_stream(model))).verdict
    fresh = prove(build("llama"), Needs(layers=(2,))).verdict
    assert asked(whole, Needs(layers=(2,))) == fresh
    assert set(asked(whole, Needs(layers=(2, 0, 2))).layers) == {"0", "2"}
    hidden = asked(whole, Needs(layers=(2,), hide=True))
    assert hidden.layers["2"] == whole.layers["2"]
    assert hidden.continuing == whole.continuing
    bare = asked(whole, Needs())
    assert (bare.reading, bare.continuing, dict(bare.layers), bare.repeats) == (whole.reading, None, {}, None)


@pytest.mark.parametrize("needs", [Needs(), Needs(continuing=True), Needs(layers=(0, 0, 2)), ALL])
def test_every_test_ticks(needs: Needs) -> None:
    ticks: list[float] = []
    prove(build("llama"), needs, tick=ticks.append)
    assert sum(ticks) == needs.tests


def test_a_layer_that_is_not_there_is_refused_before_any_test() -> None:
    with counted(model := build("llama")) as passes, pytest.raises(LayerRangeError, match=r"layer 5 is outside 0\.\.4"):
        prove(model, Needs(layers=(5,)))
    assert len(passes) == 1


def test_tests_stand_aside_of_hooks_and_leave_the_mode_as_it_was() -> None:
    wanted = prove(build("llama"), ALL).verdict
    model = build("llama")
    stream = residual_stream(model)
    seen: list[str] = []
    model.get_submodule("model.layers.1").register_forward_hook(lambda *_: seen.append("theirs"))
    model.train()
    with (
        sites.at_site(stream, 2, lambda hidden: seen.append("ours") or hidden * 0),
        sites.at_beginning(stream, lambda args, kwargs: seen.append("ours") or (args, kwargs)),
    ):
        assert prove(model, ALL).verdict == wanted
        # A hook of somebody else may be a part of the model, and stays.
        assert set(seen) == {"theirs"}
        seen.clear()
        model(torch.tensor([[5, 6, 7]]))
        assert seen == ["ours", "theirs", "ours"]
    assert all(module.training for module in model.modules())
    seen.clear()
    model(torch.tensor([[5, 6, 7]]))
    assert seen == ["theirs"]


def test_hooks_come_back_in_their_order_after_an_error() -> None:
    model = build("llama")
    stream = residual_stream(model)
    block = model.get_submodule("model.layers.1")
    order: list[int] = []

    def note(number: int) -> Any:
        return lambda *_: order.append(number)

    def fail() -> None:
        with aside(model):
            handles.append(block.register_forward_pre_hook(note(3)))
            model(torch.tensor([[5, 6]]))
            raise ValueError("inside")

    with sites.at_site(stream, 1, note(0)):
        handles = [block.register_forward_pre_hook(note(1))]
        with sites.at_site(stream, 1, note(2)):
            with pytest.raises(ValueError, match="inside"):
                fail()
            assert order == [1, 3]
            model(torch.tensor([[5, 6]]))
            assert order[2:] == [0, 1, 2, 3]
    for left in ([1, 3], [3], []):
        order.clear()
        model(torch.tensor([[5, 6]]))
        assert order == left
        if handles:
            handles.pop(0).remove()
