"""Models that a run's card names: the user's own are loaded, others are shown and need a word, in every command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import evaluate
from align.maps.fitted import load_adapter
from align.runs.train import train
from align.settings import Settings
from evaluate.injection.loading import Models, adopt
from evaluate.reproduce import Corpus, parse_scale, reproduce
from evaluate.reproduce.whole import _allowing
from featstore.errors import AdapterError, AttentionError, StrangeReferenceError
from featstore.models import trust
from featstore.models.loading import load_model
from featstore.models.references import Allowed, ModelSpec
from featstore.runtime.known import recall
from tests.support.commands import call
from tests.support.ownership import mine


@pytest.fixture(scope="module")
def fitted(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("references") / "run"
    train(Settings(str(tiny_store), "procrustes", both=True, layers="2"), out, quiet=True)
    return out


@pytest.fixture
def run(fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run from elsewhere, read by somebody who has named nothing yet; no hub can be asked."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a hub was asked")

    monkeypatch.setenv("FEATSTORE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(trust, "_SAID", set())
    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    return Path(shutil.copytree(fitted, tmp_path / "run"))


def edit_card(run: Path, name: str, **entries: object) -> None:
    path = run / "adapter.json"
    card = json.loads(path.read_text("utf-8"))
    card["models"][name] |= entries
    path.write_text(json.dumps(card), encoding="utf-8")


COMMANDS = {
    "stitch": ("--max-tokens", 60),
    "generate": ("--max-new-tokens", 2),
    "communicate": ("--examples", 1, "--summary-tokens", 2, "--max-new-tokens", 2),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_and_refuses_them(command: str, run: Path, tiny_store: Path, capsys, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was read")

    monkeypatch.setattr("featstore.models.loading.inspect_model", refuse)
    words = ("--adapter", run, *(("--store", tiny_store) if command == "stitch" else ()), *COMMANDS[command])
    said = call(capsys, "evaluate", command, *words).refusal
    assert said.startswith(f"evaluate: the card of {run} names ")
    assert "mistral='/" in said
    assert "(on this machine, outside the working folder)" in said
    assert "give --yes (yes=True in Python), or say which model you mean: --model " in said
    edit_card(run, "mistral", reference="owner/model")
    assert "mistral='owner/model' (from a hub)" in call(capsys, "evaluate", command, *words).refusal
    assert recall()[0] == frozenset()


def test_a_word_or_a_name_is_enough(run: Path, tiny_llama: Path, tiny_mistral: Path, capsys) -> None:
    words = ("generate", "--adapter", run, "--device", "cpu", *COMMANDS["generate"], "--out", run)
    done = call(capsys, "evaluate", *words, "--yes")
    assert done.code == 0
    assert f"as the card of {run} says: llama='{tiny_llama}' (on this machine" in done.err
    assert call(capsys, "evaluate", *words).code == 2  # for that time
    one = call(capsys, "evaluate", *words, "--model", f"llama={tiny_llama}").refusal
    assert "names mistral='/" in one  # the other one is known by now
    assert "llama=" not in one.partition("which you have")[0]
    assert call(capsys, "evaluate", *words, "--model", f"mistral={tiny_mistral}").code == 0


def test_functions_take_the_word(run: Path, tiny_store: Path, tiny_llama: Path, tiny_mistral: Path) -> None:
    for ask in (
        lambda: evaluate.load_models(run, quiet=True),
        lambda: evaluate.stitch(tiny_store, run, write=False, quiet=True),
        lambda: evaluate.generate(run, "a", write=False, quiet=True),
        lambda: evaluate.communicate(run, write=False, quiet=True),
        lambda: Models(load_adapter(run), ["llama"], ()),
    ):
        with pytest.raises(StrangeReferenceError, match="yes=True in Python"):
            ask()
    models = evaluate.load_models(run, device="cpu", quiet=True, yes=True)
    # What is loaded already was named by whoever loaded it.
    evaluate.generate(run, "a", models=models, max_new_tokens=2, write=False, quiet=True)
    mine(tiny_llama, tiny_mistral)
    evaluate.load_models(run, device="cpu", quiet=True)


def test_a_model_in_memory_asks_for_its_tokenizer_alone(run: Path, tiny_llama: Path) -> None:
    model = load_model(ModelSpec("llama", str(tiny_llama)), device="cpu")
    adapter = load_adapter(run)
    assert adopt(adapter, "llama", model).name == "llama"  # it says where it came from
    model.name_or_path = ""
    with pytest.raises(StrangeReferenceError, match="names llama="):
        adopt(adapter, "llama", model)
    assert adopt(adapter, "llama", model, Allowed(references=True)).name == "llama"
    with pytest.raises(StrangeReferenceError):
        evaluate.inject(model, run, text="a b", source=model, key="mistral:2->llama:2")
    # States of one's own need no tokenizer.
    assert evaluate.inject(model, run, mapped=torch.zeros(1, 48), positions=[1], key="mistral:2->llama:2")


def test_an_attention_out_of_a_card_is_one_of_the_list(run: Path, tiny_llama: Path, tiny_mistral: Path) -> None:
    mine(tiny_llama, tiny_mistral)
    edit_card(run, "llama", attention="nobody/no-such-kernel")
    with pytest.raises(
        AttentionError, match=r"attention 'nobody/no-such-kernel' in the card of .*: choose one of auto,"
    ):
        evaluate.load_models(run, device="cpu", quiet=True)


def test_a_reference_that_is_no_text_is_one_line(run: Path) -> None:
    edit_card(run, "llama", reference=["x"])
    with pytest.raises(AdapterError, match="reference is a list of 1, expected text"):
        evaluate.load_models(run, device="cpu", quiet=True)


class TestReproduce:
    SCALE = parse_scale(stitch_tokens="60", tasks=("countries",), examples=1, epochs=1, ranks="2", latents="2x2")

    def test_a_store_from_elsewhere_is_refused_before_the_first_step(self, run: Path, tiny_store: Path) -> None:
        started: list[tuple[str, ...]] = []
        with pytest.raises(StrangeReferenceError, match="names llama="):
            reproduce(run / "out", self.SCALE, store=tiny_store, corpus=Corpus(), run=lambda *a: started.append(a))
        assert started == []
        assert not (run / "out").exists()

    def test_the_word_goes_to_the_commands_that_load_models(self) -> None:
        started: list[tuple[str, ...]] = []
        run = _allowing(lambda *words: started.append(words), Allowed(references=True, pickles=True))
        for words in (("align", "train", "--out", "x"), ("evaluate", "stitch"), ("evaluate", "report", "x")):
            run(*words)
        said = ("--yes", "--allow-pickle-weights")
        assert started == [("align", "train", "--out", "x"), ("evaluate", "stitch", *said), ("evaluate", "report", "x")]

    def test_a_step_is_the_same_with_and_without_the_word(self, run: Path, tiny_store: Path) -> None:
        given = {"store": tiny_store, "corpus": Corpus(), "allowed": Allowed(references=True)}
        reproduce(run / "out", self.SCALE, **given, run=lambda *_: None)
        steps = json.loads((run / "out" / "steps.json").read_text("utf-8"))["steps"]
        assert not any("--yes" in step["command"] for step in steps.values())
