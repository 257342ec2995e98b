"""What was found out about a model is looked up, completed and kept; what cannot be read is found out again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from featstore.errors import LayerRangeError
from featstore.models.layout import Batching, Continuing
from featstore.models.probe import prove as module
from featstore.models.probe.prove import Needs, asked, everything, further, key_of, probe_key, prove, recalled
from featstore.models.residual import at_site, capture
from featstore.models.stack import ordinary_ids, residual_stream
from featstore.models.verdict import Verdict
from tests.support.architectures.building import build
from tests.support.tiny_models import small

NAMED = {"weights": "w", "config": "c", "device": "cpu", "dtype": "float32", "attention": "sdpa"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEATSTORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def key(cache: Path) -> str:
    return probe_key(**NAMED)


def file_of(cache: Path) -> Path:
    [path] = cache.rglob("*.json")
    return path


class Counted:
    """Passes through a model."""

    def __init__(self, model: nn.Module) -> None:
        self.passes = 0
        decoder: Any = residual_stream(model).decoder
        decoder.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.passes += 1

    def taken(self) -> int:
        count, self.passes = self.passes, 0
        return count


def fresh(name: str = "llama") -> tuple[nn.Module, Counted]:
    """A model that this process knows nothing of but where its blocks are."""
    model = build(name)
    return model, Counted(model)


# What a stream knows.


def test_a_stream_knows_what_was_found_out() -> None:
    stream = prove(build("bamba"), Needs(continuing=True, layers=(0, 2))).stream
    assert stream.continuing == Continuing(positions=True)
    assert stream.batching == Batching()
    assert stream.skips == {0}
    assert prove(build("phi3@longrope")).stream.batching == Batching("padded", 16)
    assert prove(build("llama@bidirectional")).stream.batching == Batching("equal")
    assert prove(build("mamba"), Needs(continuing=True)).stream.continuing == Continuing("stepwise", branching="reread")
    assert prove(build("deepseek_v4"), Needs(continuing=True)).stream.continuing == Continuing(padding=False)
    assert prove(build("llama@bidirectional"), Needs(continuing=True)).verdict.continuing is not None


def test_what_finding_the_stream_says_is_recorded() -> None:
    verdict = prove(small("deepseek_v4")).verdict
    said = (verdict.stack, verdict.blocks, verdict.width, verdict.streams, verdict.stream_dtype, verdict.embeddings)
    assert said == ("model.layers", 4, 256, 4, "float32", 300)
    assert set(verdict.versions) == {"torch", "transformers"}
    assert verdict.attention == residual_stream(small("deepseek_v4")).model.config._attn_implementation
    assert prove(build("llama")).verdict.attention == "sdpa"


def test_a_layer_that_there_is_not_is_refused_before_any_test() -> None:
    model, counted = fresh()
    with pytest.raises(LayerRangeError, match=r"layer 5 is outside 0\.\.4"):
        prove(model, Needs(layers=(1, 5)))
    assert counted.taken() == 0


def test_only_what_is_needed_is_tested_and_nothing_twice() -> None:
    model, counted = fresh()
    assert prove(model).verdict.continuing is None
    assert 0 < counted.taken() <= 7
    first = prove(model, Needs(layers=(1,)))
    assert set(first.verdict.layers) == {"1"}
    assert first.verdict.layers["1"].hide is None
    assert first.verdict.continuing is None
    assert 0 < counted.taken() <= 8
    both = further(first, Needs(layers=(2, 1), hide=True))
    assert {name: entry.hide for name, entry in both.verdict.layers.items()} == {"1": 0, "2": 0}
    assert both.verdict.continuing is not None
    assert counted.taken() > 0
    assert further(both, Needs(True, (1, 2), hide=True)).verdict == both.verdict
    assert prove(model, Needs(True, (1, 2), hide=True)).verdict == both.verdict
    assert counted.taken() == 0


def test_what_was_asked_does_not_depend_on_what_others_had_tested() -> None:
    model, _ = fresh()
    alone = asked(prove(model, Needs(layers=(1,))).verdict, Needs(layers=(1,)))
    whole = prove(model, everything(residual_stream(model))).verdict
    assert set(whole.layers) == {"0", "1", "2", "3", "4"}
    assert whole != alone
    assert asked(whole, Needs(layers=(1,))) == alone
    assert asked(whole, Needs()).layers == {}


# Between commands.


def test_a_verdict_is_recalled_by_the_next_command(cache: Path, key: str) -> None:
    model, counted = fresh()
    needs = Needs(continuing=True, layers=(0, 3), hide=True)
    verdict = prove(model, needs, key=key).verdict
    assert counted.taken() > 0
    assert recalled(key) == verdict
    # Another process: the same weights in another object.
    other, counted = fresh()
    again = prove(other, needs, key=key)
    assert again.verdict == verdict
    assert counted.taken() == 0
    assert again.stream.skips == {0, 3}
    assert again.stream.continuing == Continuing()


def test_further_layers_are_added_to_what_is_kept(cache: Path, key: str) -> None:
    prove(fresh()[0], Needs(layers=(3,)), key=key)
    held = recalled(key)
    assert held is not None
    assert (set(held.layers), held.continuing) == ({"3"}, None)
    prove(fresh()[0], Needs(continuing=True, layers=(1,), hide=True), key=key)
    kept = recalled(key)
    assert kept is not None
    assert list(kept.layers) == ["1", "3"]
    assert kept.layers["3"] == held.layers["3"]
    assert kept.layers["1"].hide == 0
    assert kept.reading == held.reading
    assert kept.continuing is not None
    # Hiding at a layer that was tested for injection alone.
    prove(fresh()[0], Needs(layers=(3,), hide=True), key=key)
    last = recalled(key)
    assert last is not None
    assert last.layers["3"].hide == 0
    assert last.layers["3"].leak == held.layers["3"].leak
    assert last.layers["1"] == kept.layers["1"]


def test_without_a_key_nothing_is_written(cache: Path) -> None:
    prove(fresh()[0], Needs(layers=(1,)))
    assert not cache.exists()


@pytest.mark.parametrize("name", [*NAMED, "versions", "tests"])
def test_whatever_may_change_the_tests_has_another_key(name: str, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    values = dict(NAMED)
    if name == "versions":
        monkeypatch.setattr(module, "versions", lambda: {"torch": "0.1", "transformers": "0.2"})
    elif name == "tests":
        monkeypatch.setattr(module, "_VERSION", module._VERSION + 1)
    else:
        values[name] += "x"
    assert probe_key(**values) != key
    monkeypatch.undo()
    assert probe_key(**NAMED) == key


def test_other_libraries_than_those_that_compute_change_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before, known = probe_key(**NAMED), module.versions()
    monkeypatch.setattr(module, "versions", lambda: {**known, "numpy": "99"})
    assert probe_key(**NAMED) == before


def test_a_verdict_of_tests_that_have_changed_is_not_recalled(
    cache: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prove(fresh()[0], key=key)
    monkeypatch.setattr(module, "_VERSION", module._VERSION + 1)
    other = probe_key(**NAMED)
    assert recalled(other) is None
    model, counted = fresh()
    prove(model, key=other)
    assert counted.taken() > 0
    assert len(list(cache.rglob("*.json"))) == 2


def test_the_key_of_a_loaded_model_says_how_it_is_run() -> None:
    model = build("llama")
    single = key_of(model, weights="w", config="c")
    assert single == probe_key(**NAMED)
    assert key_of(model, weights=None, config="c") is None
    assert key_of(model, weights="v", config="c") != single
    assert key_of(build("llama").bfloat16(), weights="w", config="c") != single
    model.config._attn_implementation = "eager"
    assert key_of(model, weights="w", config="c") != single


def damages() -> Iterator[tuple[str, bytes]]:
    yield "empty", b""
    yield "cut", b'{"blocks": 4, "layers": {"1": {"hide'
    yield "binary", bytes(range(256))
    yield "a list", b"[]"
    yield "a number of the wrong kind", b'{"blocks": "four"}'
    yield "a layer that is none", b'{"blocks": 4, "layers": {"1": 7}}'
    yield "a layer named by a word", b'{"blocks": 4, "layers": {"one": {"leak": 0}}}'
    yield "NaN", b'{"blocks": 4, "repeats": NaN}'


@pytest.mark.parametrize("damage", [damage for _, damage in damages()], ids=[name for name, _ in damages()])
def test_a_damaged_file_is_found_out_again_and_replaced(cache: Path, key: str, damage: bytes) -> None:
    verdict = prove(fresh()[0], Needs(layers=(1,)), key=key).verdict
    path = file_of(cache)
    path.write_bytes(damage)
    assert recalled(key) is None
    model, counted = fresh()
    assert prove(model, Needs(layers=(1,)), key=key).verdict == verdict
    assert counted.taken() > 0
    assert recalled(key) == verdict


@pytest.mark.parametrize("field", ["stack", "blocks", "width"])
def test_a_verdict_on_another_stack_does_not_count(cache: Path, key: str, field: str) -> None:
    verdict = prove(fresh()[0], key=key).verdict
    path = file_of(cache)
    values = json.loads(path.read_text())
    values[field] = "elsewhere" if field == "stack" else 7
    values["reading"]["batching"] = "single"
    path.write_text(json.dumps(values))
    proven = prove(fresh()[0], key=key)
    assert proven.verdict == verdict
    assert proven.stream.batching == Batching()
    assert recalled(key) == verdict


def test_a_cache_that_cannot_be_written_is_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/dev/null")):
        monkeypatch.setenv("FEATSTORE_CACHE", str(place))
        assert prove(fresh()[0], Needs(layers=(1,)), key=probe_key(**NAMED)).verdict.layers["1"].leak == 0
        assert recalled(probe_key(**NAMED)) is None
    assert (tmp_path / "file").read_text() == "x"


def test_a_directory_in_the_place_of_a_file_is_no_verdict(cache: Path, key: str) -> None:
    (cache / "verdicts" / f"{key}.json").mkdir(parents=True)
    assert recalled(key) is None
    assert prove(fresh()[0], key=key).verdict.reading is not None


# A model that is in use.


def test_a_model_that_is_in_use_is_tested_as_it_is_alone() -> None:
    wanted = prove(build("llama"), Needs(continuing=True, layers=(1, 2), hide=True)).verdict
    model = build("llama")
    stream = residual_stream(model)
    seen = []
    with at_site(stream, 1, lambda hidden: seen.append(1) or hidden * 2):  # type: ignore[func-returns-value]
        found = prove(model, Needs(continuing=True, layers=(1, 2), hide=True)).verdict
        assert not seen
        capture(stream, ordinary_ids(model, 1, 3), [2])
    assert seen == [1]
    assert found == wanted


def test_a_model_in_training_mode_is_tested_without_dropout_and_stays_in_it() -> None:
    model = build("gpt2")
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.5
    model.train()
    model.transformer.h[1].eval()  # type: ignore[index, union-attr]
    verdict = prove(model, Needs(layers=(1,))).verdict
    assert (verdict.repeats, verdict.layers["1"].leak) == (0, 0)
    assert model.training
    assert model.transformer.h[0].training  # type: ignore[index, union-attr]
    assert not model.transformer.h[1].training  # type: ignore[index, union-attr]


def test_a_model_that_runs_otherwise_now_is_tested_again() -> None:
    model, counted = fresh()
    prove(model)
    counted.taken()
    assert prove(model.bfloat16()).verdict.stream_dtype == "bfloat16"
    assert counted.taken() > 1


def test_tests_tick_as_often_as_they_say() -> None:
    for needs in (Needs(), Needs(continuing=True), Needs(layers=(1, 1, 3)), Needs(layers=(0, 2), hide=True)):
        ticks: list[int] = []
        prove(build("llama"), needs, tick=ticks.append)
        assert sum(ticks) == needs.tests
        again: list[int] = []
        proven = prove(build("llama"), needs)
        further(replace(proven, verdict=Verdict.parse(proven.verdict.content())), needs, tick=again.append)
        assert sum(again) <= needs.tests


def test_no_gradients_are_left_behind() -> None:
    model = build("llama").requires_grad_(requires_grad=True)
    prove(model, Needs(continuing=True, layers=(1,), hide=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    model(torch.tensor([[5, 6]])).logits.sum().backward()
