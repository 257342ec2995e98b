"""Layers that leak, and prompts that cannot be hidden: refused, or shown beside every figure, on real tiny models.

The target ``gemma`` mixes embeddings of the token ids into every block, so its stream, four side by side in a row, is
not all that later blocks know; only at its last layer it is. The target ``lfm`` has convolutions, from which no mask
hides a prompt.
"""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import evaluate
from align.maps.fitted import load_adapter
from align.runs.train import train
from align.settings import LoopSettings, Settings
from evaluate.communication.verdicts import describe as describe_answers
from evaluate.generation.generate import describe as describe_texts
from evaluate.injection.loading import Loaded
from evaluate.injection.own_loop import _read
from evaluate.reporting import build_report
from evaluate.results import read_communication, read_generations, read_stitch
from evaluate.stitching.epochs import EpochEvaluation
from evaluate.stitching.words import describe as describe_losses
from featstore.errors import ProbeError, SpecError
from featstore.extraction.job import prepare
from featstore.extraction.run import extract
from featstore.extraction.settings import Settings as Extraction
from featstore.models.residual import capture
from featstore.models.stack import residual_stream
from featstore.models.verdict import Verdict
from tests.support.architectures.building import build, save
from tests.support.architectures.configuration import Sizes
from tests.support.commands import call
from tests.support.report_fixtures import Page

LEAKS, CLEAN, CONVOLVES = "llama:2->gemma:2", "llama:3->gemma:6", "llama:2->lfm:2"
PROMPTS = ["The capital of France is", "A longer prompt of more words than"]
REFUSED = r"model 'gemma', layer 2: the swap test leaks 0\.\d+ .* type --allow-side-channel"


@pytest.fixture(scope="module")
def world(tiny_llama: Path, short_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A store of three models, and maps into both targets."""
    root = tmp_path_factory.mktemp("leaks")
    gemma = save("gemma3n_text", root / "gemma", tiny_llama)
    lfm = save("lfm2", root / "lfm", tiny_llama)
    settings = Extraction(
        model=(f"llama={tiny_llama}", f"gemma={gemma}", f"lfm={lfm}"),
        layers=("llama=2,3", "gemma=2,6", "lfm=2"),
        dataset=f"jsonl:{short_corpus}",
        store=root / "store.zarr",
        max_tokens=None,
        window_bytes=512,
        batch_tokens=1024,
        shard_rows=2048,
        device="cpu",
    )
    extract(prepare(settings, quiet=True), quiet=True)
    made = SimpleNamespace(store=root / "store.zarr", gemma=gemma, lfm=lfm)
    for name, type_, target, pairs, more in (
        ("mixed", "affine", "gemma", "2:2,3:6", {}),
        ("hidden", "affine", "lfm", "2:2", {}),
        ("windows", "compress", "lfm", "2:2", {"loop": LoopSettings(epochs=1, latents=4, latent_dim=8, batch_size=8)}),
    ):
        settings_ = Settings(str(made.store), type_, source="llama", target=target, layer_map=pairs, **more)
        train(settings_, root / name, quiet=True)
        setattr(made, name, root / name)
    made.models = evaluate.load_models(made.mixed, device="cpu", quiet=True)
    made.convolving = evaluate.load_models(made.hidden, device="cpu", quiet=True)
    return made


# Refused.


def test_a_layer_that_leaks_is_refused_by_every_command_and_nothing_is_written(
    world: SimpleNamespace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for words in (
        ("stitch", "--store", world.store, "--max-tokens", "60"),
        ("generate", "--max-new-tokens", "2"),
        ("communicate", "--task", "lookup:2", "--examples", "2"),
    ):
        done = call(capsys, "evaluate", *words, "--adapter", world.mixed, "--out", tmp_path, "--device", "cpu")
        assert done.code == 2
        refusal = done.err.splitlines()[-1]
        assert re.search(REFUSED, refusal)
        assert "(later blocks learn of the text past the residual stream)" in refusal
    assert list(tmp_path.iterdir()) == []


def test_a_clean_layer_of_the_same_model_is_taken(world: SimpleNamespace) -> None:
    given: dict[str, Any] = {"layers": 3, "models": world.models, "write": False, "quiet": True}
    stitched = evaluate.stitch(world.store, world.mixed, max_tokens=60, keep="hide", **given)
    assert stitched.pairs[CLEAN].leak == 0
    assert [found.code for found in stitched.pairs[CLEAN].warnings] == ["few-documents"]
    assert list(stitched.verified) == ["gemma"]
    assert list(stitched.verified["gemma"].layers) == ["6"]
    assert "leak" not in describe_losses(stitched.content())
    # The start token is the one of the configuration, because the tokenizer has none.
    tokenizer = world.models["gemma"].info.tokenizer
    assert stitched.start["gemma"].id == tokenizer.bos_token_id
    assert stitched.start["gemma"].token == "<|im_start|>"
    own = evaluate.stitch(world.store, world.mixed, max_tokens=60, **given)
    assert dict(own.start) == {}
    assert "hide" not in own.verified["gemma"].layers["6"].content()


def test_a_prompt_that_cannot_be_hidden_is_refused(world: SimpleNamespace) -> None:
    words = r"model 'lfm', layer 2: --keep hide fails the two-prompt test: blocks 0, 1, 3 keep a recurrent or convol"
    with pytest.raises(ProbeError, match=words):
        evaluate.stitch(world.store, world.hidden, keep="hide", models=world.convolving, write=False, quiet=True)
    result = evaluate.stitch(world.store, world.hidden, max_tokens=60, models=world.convolving, write=False, quiet=True)
    assert result.pairs[CONVOLVES].leak == 0


def test_training_says_so_where_models_are_asked_every_epoch(world: SimpleNamespace) -> None:
    adapter = load_adapter(world.mixed)
    from featstore.store import open_store

    evaluation = EpochEvaluation(open_store(world.store), adapter.card, device="cpu", quiet=True)
    evaluation._models.update(world.models)
    with pytest.raises(ProbeError, match=r"swap test leaks .*; leave --eval-models out or choose other --layers"):
        evaluation(adapter.aligners[LEAKS])
    figures = evaluation(adapter.aligners[CLEAN])
    assert figures["stitched"]["leak"] == 0


# Allowed.


@pytest.fixture(scope="module")
def allowed(world: SimpleNamespace) -> SimpleNamespace:
    given: dict[str, Any] = {"models": world.models, "allow_side_channel": True, "quiet": True}
    stitched = evaluate.stitch(world.store, world.mixed, max_tokens=60, **given)
    texts = evaluate.generate(world.mixed, PROMPTS, max_new_tokens=3, **given)
    answers = evaluate.communicate(world.mixed, "lookup:2", examples=3, max_new_tokens=2, **given)
    leak = world.models["gemma"].tested(_at(2)).verdict.layers["2"].leak
    return SimpleNamespace(stitched=stitched, texts=texts, answers=answers, leak=leak, mark=f"leak {leak:.2g}")


def _at(layer: int) -> Any:
    from featstore.models.probe.prove import Needs

    return Needs(layers=(layer,))


def test_the_leak_is_the_swap_tests_and_stands_in_every_file(world: SimpleNamespace, allowed: SimpleNamespace) -> None:
    assert 0.01 < allowed.leak < 2
    stitched, texts, answers = read_stitch(world.mixed), read_generations(world.mixed), read_communication(world.mixed)
    assert {key: pair.leak for key, pair in stitched.pairs.items()} == {LEAKS: allowed.leak, CLEAN: 0}
    assert dict(texts.leaks) == {LEAKS: allowed.leak, CLEAN: 0}
    [task] = answers.tasks.values()
    assert {key: pair.leak for key, pair in task.pairs.items()} == {LEAKS: allowed.leak, CLEAN: 0}
    for result, names in ((stitched, ["gemma"]), (texts, ["gemma", "llama"]), (answers, ["gemma", "llama"])):
        assert sorted(result.verified) == names
        assert result.verified["gemma"].layers["2"].leak == allowed.leak
        assert result.verified["gemma"].blocks == 6
    assert [w.code for w in stitched.pairs[LEAKS].warnings] == ["side-channel", "few-documents"]
    assert [found.code for found in stitched.pairs[CLEAN].warnings] == ["few-documents"]
    assert [w.code for w in texts.warnings] == ["side-channel"]
    assert [w for w in task.warnings if w.code == "side-channel"] == [texts.warnings[0]]
    assert texts.warnings[0].where == {"pair": LEAKS}
    assert texts.warnings[0].sentence.startswith(f"the swap test {allowed.mark.replace('leak', 'leaks')} at")


def test_the_leak_stands_beside_every_figure_for_people(allowed: SimpleNamespace) -> None:
    mark = f"[{allowed.mark}]"
    for text, figures in (
        (describe_losses(allowed.stitched.content()), r"nats/token|recovered"),
        (describe_answers(allowed.answers.content()), r"%  \("),
    ):
        first, second = text.index(LEAKS), text.index(CLEAN)
        block, rest = (text[first:second], text[second:]) if first < second else (text[first:], text[second:first])
        lines = [line for line in block.splitlines() if re.search(figures, line) and " clean " not in line]
        assert len(lines) > 5
        assert all(line.endswith(mark) for line in lines), block
        assert f"{allowed.mark}: later blocks also learn of the text past the stream" in block
        assert "leak 0" not in rest.replace(mark, "")
    texts = describe_texts(allowed.texts.content())
    lines = texts.splitlines()
    assert all(line.endswith(mark) for line in lines if line.startswith(f"  {LEAKS}:"))
    assert not any(line.endswith(mark) for line in lines if line.startswith(f"  {CLEAN}:"))
    assert f"{LEAKS}: {allowed.mark}: later blocks" in texts


def test_the_leak_stands_in_a_notebook(allowed: SimpleNamespace) -> None:
    for result in (allowed.stitched, allowed.texts, allowed.answers):
        assert allowed.mark in result._repr_html_()
        frame = result.to_pandas()
        leaking = frame[frame["pair"] == LEAKS]
        if "clean" in set(leaking["condition"]):
            leaking = leaking[leaking["condition"] != "clean"]
        assert set(leaking["leak"]) == {allowed.leak}
        assert set(frame[frame["pair"] == CLEAN]["leak"].dropna()) == {0}
        figure = result.plot()
        words = [axes.get_title() for axes in figure.axes]
        words += [tick.get_text() for axes in figure.axes for tick in axes.get_yticklabels()]
        assert any(allowed.mark in word for word in words)


def test_the_report_shows_it_beside_the_figures_and_what_was_verified(
    world: SimpleNamespace, allowed: SimpleNamespace
) -> None:
    page = Page(build_report([world.mixed]))
    page.check()
    text = page.text
    assert text.count(allowed.mark) > 20
    assert "leak 0" not in text.replace(allowed.mark, "")
    assert "What was verified on the models" in text
    row = text[text.index("What was verified on the models") :]
    assert f"0 at 6; {allowed.leak:.2g} at 2" in row
    assert "holds at layer 6; refused at layer 2: two prompts with the same injected states differ by" in row
    assert "side-channel" in text[text.index("Warnings") :]


def test_the_command_takes_the_flag(
    world: SimpleNamespace, allowed: SimpleNamespace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ("--adapter", world.mixed, "--layers", "2", "--out", tmp_path, "--device", "cpu", "--json")
    done = call(
        capsys, "evaluate", "stitch", "--store", world.store, "--max-tokens", "60", "--allow-side-channel", *words
    )
    assert done.json["pairs"][LEAKS]["leak"] == allowed.leak
    with pytest.raises(SpecError, match="allow_side_channel='yes': expected bool"):
        evaluate.generate(world.mixed, PROMPTS, allow_side_channel="yes", write=False, quiet=True)  # type: ignore[arg-type]


# Communication without what cannot be hidden.


@pytest.mark.parametrize("run", ["hidden", "windows"])
def test_answers_from_a_context_that_cannot_be_hidden_are_left_out(
    world: SimpleNamespace, run: str, tmp_path: Path
) -> None:
    answers = evaluate.communicate(
        getattr(world, run), "lookup:2", examples=3, max_new_tokens=2, models=world.convolving, out=tmp_path, quiet=True
    )
    [task] = answers.tasks.values()
    ways = {block.condition for block in task.conditions.values()} - {"silent", "text", "summary"}
    assert bool(ways) == (run == "hidden")
    assert not any(str(way).startswith("aligned") for way in ways)
    assert not any(name.startswith("aligned") for name in task.gains)
    reason = task.reasons[f"aligned {CONVOLVES}"]
    assert reason.startswith("--keep hide fails the two-prompt test: blocks 0, 1, 3 keep a recurrent or convolution")
    assert dict(answers.start) == {}
    assert task.pairs[CONVOLVES].leak == 0
    for text in (describe_answers(answers.content()), answers._repr_html_()):
        assert reason in text
    answers.plot()
    assert len(answers.to_pandas()) == len(task.conditions)
    assert read_communication(tmp_path).content() == answers.content()
    page = Page(build_report([tmp_path]))
    page.check()
    assert reason in page.text
    if run == "windows":
        assert "No map answered any question." in page.text


def test_answers_name_the_start_token_where_a_context_was_hidden(world: SimpleNamespace) -> None:
    answers = evaluate.communicate(
        world.mixed,
        "lookup:2",
        layers=3,
        itself=True,
        examples=2,
        max_new_tokens=2,
        models=world.models,
        write=False,
        quiet=True,
    )
    task, own = answers.tasks.values()
    assert f"aligned {CLEAN}" in task.conditions
    assert "aligned gemma:6->gemma:6" in own.conditions
    assert own.pairs["gemma:6->gemma:6"].leak == 0
    assert {name: start.token for name, start in answers.start.items()} == {"gemma": "<|im_start|>"}


# A loop of one's own.


def _model(world: SimpleNamespace, name: str = "gemma") -> Any:
    loaded: Loaded = {**world.models, **world.convolving}[name]
    return loaded.model


def _states(count: int = 2) -> torch.Tensor:
    return torch.zeros(count, 48)


@pytest.mark.parametrize("loaded", [True, False])
def test_inject_refuses_as_the_commands_do(world: SimpleNamespace, loaded: bool) -> None:
    model = world.models["gemma"] if loaded else _model(world)
    given: dict[str, Any] = {"states": _states(), "positions": [1, 3]}
    with pytest.raises(ProbeError, match=r"model 'gemma', layer 2: the swap test leaks .*allow_side_channel=True"):
        evaluate.inject(model, world.mixed, key=LEAKS, **given)
    injection = evaluate.inject(model, world.mixed, key=LEAKS, allow_side_channel=True, **given)
    assert injection.leak is not None
    assert injection.leak > 0.01
    assert repr(injection).endswith(f"passes=0, leak {injection.leak:.2g})")
    clean = evaluate.inject(model, world.mixed, key=CLEAN, keep="hide", **given)
    assert clean.leak == 0
    assert "leak" not in repr(clean)
    with pytest.raises(ProbeError, match=r"'lfm', layer 2: --keep hide fails the two-prompt test"):
        evaluate.inject(world.convolving["lfm"], world.hidden, keep="hide", **given)
    with pytest.raises(SpecError, match="allow_side_channel=1: expected bool"):
        evaluate.inject(model, world.mixed, key=LEAKS, allow_side_channel=1, **given)  # type: ignore[arg-type]


def test_inject_of_a_text_refuses_as_well(world: SimpleNamespace) -> None:
    given: dict[str, Any] = {"text": PROMPTS, "source": world.models["llama"]}
    with pytest.raises(ProbeError, match="swap test leaks"):
        evaluate.inject(world.models["gemma"], world.mixed, key=LEAKS, **given)
    injection = evaluate.inject(world.models["gemma"], world.mixed, key=LEAKS, allow_side_channel=True, **given)
    with torch.no_grad(), injection:
        _model(world)(**injection.inputs)
    assert injection.passes == 1


def test_a_text_is_read_whole_by_a_model_whose_cached_prompt_is_not(world: SimpleNamespace) -> None:
    """Blocks that share keys get one token of a prompt unless the logits of all are asked for."""
    like = world.models["gemma"]
    model = build("gemma4_text", Sizes(len(like.info.tokenizer), 64))
    stream = residual_stream(model)
    loaded = replace(like, model=model, stream=stream, verdict=Verdict(), median_norm={2: 9.0, 6: 9.0})
    read = _read(loaded, PROMPTS[:1], (2, 6))
    count = len(read.windows[0].ids)
    assert count > 2
    wanted = capture(stream, read.ids, [6])[6]
    assert read.states[6].shape == wanted.shape == (1, count, 64)
    torch.testing.assert_close(read.states[6], wanted)


@pytest.mark.parametrize("keep", ["own", "hide"])
def test_a_model_that_is_in_use_is_tested_and_read_aside(world: SimpleNamespace, keep: str) -> None:
    """Nothing is known of a copy: its tests run while another injection's hooks are on it."""
    given: dict[str, Any] = {"allow_side_channel": True}
    ids = torch.randint(5, 100, (1, 12), generator=torch.Generator().manual_seed(1))
    wanted = evaluate.inject(_model(world), world.mixed, key=LEAKS, states=_states(), positions=[1, 3], **given).leak
    model = deepcopy(_model(world))
    residual_stream(model)
    outer = evaluate.inject(model, world.mixed, key=CLEAN, keep=keep, states=_states(), positions=[2, 11])
    with torch.no_grad(), outer:
        alone = model(ids).logits
        inner = evaluate.inject(model, world.mixed, key=LEAKS, states=_states(), positions=[1, 3], **given)
        read = evaluate.inject(
            model, world.mixed, key=CLEAN, keep="hide", text=PROMPTS[0], source=world.models["llama"]
        )
        assert outer.passes == 1
        assert torch.equal(model(ids).logits, alone)
        with inner:
            both = model(ids).logits
    assert inner.leak == wanted
    assert (outer.passes, inner.passes) == (3, 1)
    assert not torch.equal(both, alone)
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())
    fresh = evaluate.inject(
        world.models["gemma"], world.mixed, key=CLEAN, keep="hide", text=PROMPTS[0], source=world.models["llama"]
    )
    assert torch.equal(read.states[0], fresh.states[0])
    # What is known is not tested again.
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    evaluate.inject(model, world.mixed, key=LEAKS, states=_states(), positions=[1, 3], **given)
    handle.remove()
    assert not calls
