"""Continuations: each model alone is what transformers gives, its own states put back change nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import evaluate.generation.voices as module
from align.maps.fitted import load_adapter
from align.runs.train import train
from align.settings import Settings
from evaluate.generation.generate import PROMPTS, describe, generate, read_prompts
from evaluate.injection.loading import Models
from evaluate.injection.positions import source_positions
from featstore.errors import AdapterError, SpecError
from featstore.models.sampling import Sampling
from tests.support.commands import call, strict_json

TEXTS = ("The capital of France is", "One line – with a dash\nand another", "naïve 東京")
NEW = 6
CONDITIONS = {"mapped", "self", "mean", "random_norm", "shuffled"}


@pytest.fixture(scope="module")
def runs(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    base = tmp_path_factory.mktemp("generate")
    train(Settings(str(tiny_store), "affine", both=True, layers="2"), base / "both", quiet=True)
    train(Settings(str(tiny_store), "affine", layers="2"), base / "one", quiet=True)
    train(Settings(str(tiny_store), "procrustes", source="llama", target="llama", layers="2"), base / "own", quiet=True)
    return SimpleNamespace(**{name: base / name for name in ("both", "one", "own")})


@pytest.fixture(scope="module")
def result(runs: SimpleNamespace) -> dict[str, Any]:
    return generate(load_adapter(runs.both), TEXTS, max_new_tokens=NEW, quiet=True)


def transformers_text(path: Path, prompt: str, **options: Any) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    inputs = tokenizer(prompt, return_tensors="pt")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    output = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, pad_token_id=0, **options)
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def test_each_model_alone_is_transformers_own_greedy_text(
    result: dict[str, Any], tiny_llama: Path, tiny_mistral: Path
) -> None:
    assert [entry["prompt"] for entry in result["entries"]] == list(TEXTS)
    for entry in result["entries"]:
        assert (entry["source"], entry["target"]) == ("llama", "mistral")
        assert entry["source_alone"] == transformers_text(tiny_llama, entry["prompt"])
        assert entry["target_alone"] == transformers_text(tiny_mistral, entry["prompt"])
    assert (result["max_new_tokens"], result["decoding"]) == (NEW, "greedy")


def test_a_models_own_states_put_back_give_its_own_text(result: dict[str, Any]) -> None:
    for entry in result["entries"]:
        there, back = entry["source_to_target"], entry["target_to_source"]
        assert list(there) == ["llama:2->mistral:2"]
        assert list(back) == ["mistral:2->llama:2"]
        assert set(there["llama:2->mistral:2"]) == set(back["mistral:2->llama:2"]) == CONDITIONS
        assert there["llama:2->mistral:2"]["self"] == entry["target_alone"]
        assert back["mistral:2->llama:2"]["self"] == entry["source_alone"]


def test_what_is_put_in_matters(result: dict[str, Any]) -> None:
    for role, own in (("source_to_target", "target_alone"), ("target_to_source", "source_alone")):
        texts = [(next(iter(entry[role].values())), entry[own]) for entry in result["entries"]]
        for condition in CONDITIONS - {"self"}:
            assert any(stitched[condition] != alone for stitched, alone in texts), (role, condition)


def test_a_run_in_one_direction_has_three_conditions(runs: SimpleNamespace, result: dict[str, Any]) -> None:
    one = generate(load_adapter(runs.one), TEXTS[:2], max_new_tokens=NEW, quiet=True)
    for entry, full in zip(one["entries"], result["entries"], strict=False):
        assert entry["target_to_source"] == {}
        assert entry["source_alone"] == full["source_alone"]
        assert entry["target_alone"] == full["target_alone"]
        for condition in ("mapped", "self", "mean", "random_norm"):
            key = "llama:2->mistral:2"
            assert entry["source_to_target"][key][condition] == full["source_to_target"][key][condition]
    assert TEXTS[0] in describe(one)


def test_a_model_mapped_to_itself_says_what_it_says(runs: SimpleNamespace) -> None:
    own = generate(load_adapter(runs.own), TEXTS, max_new_tokens=NEW, quiet=True)
    for entry in own["entries"]:
        assert entry["target_to_source"] == {}
        stitched = entry["source_to_target"]["llama:2->llama:2"]
        assert stitched["mapped"] == stitched["self"] == entry["source_alone"] == entry["target_alone"]


def test_the_seed_decides_the_random_controls_and_nothing_else(runs: SimpleNamespace, result: dict[str, Any]) -> None:
    adapter = load_adapter(runs.both)
    assert generate(adapter, TEXTS, max_new_tokens=NEW, quiet=True) == result
    other = generate(adapter, TEXTS, max_new_tokens=NEW, seed=1, quiet=True)
    changed = set()
    for one, two in zip(result["entries"], other["entries"], strict=True):
        for role in ("source_to_target", "target_to_source"):
            first, second = (next(iter(entry[role].values())) for entry in (one, two))
            changed |= {condition for condition in CONDITIONS if first[condition] != second[condition]}
    assert "random_norm" in changed
    assert changed <= {"random_norm", "shuffled"}


def test_one_prompt_has_no_other_text_to_shuffle_with(runs: SimpleNamespace) -> None:
    [entry] = generate(load_adapter(runs.one), TEXTS[:1], max_new_tokens=2, quiet=True)["entries"]
    texts = entry["source_to_target"]["llama:2->mistral:2"]
    assert texts["shuffled"] is None
    assert texts["mapped"] is not None
    assert "shuffled" not in describe({"entries": [entry]})


def test_conditions_may_be_chosen_and_change_nothing_else(runs: SimpleNamespace, result: dict[str, Any]) -> None:
    some = generate(load_adapter(runs.both), TEXTS, max_new_tokens=NEW, conditions=("mapped",), quiet=True)
    for entry, everything in zip(some["entries"], result["entries"], strict=True):
        assert entry["target_alone"] == everything["target_alone"]
        for pair, texts in entry["source_to_target"].items():
            assert texts == {"mapped": everything["source_to_target"][pair]["mapped"]}
    with pytest.raises(SpecError, match="choose any of mapped"):
        generate(load_adapter(runs.both), TEXTS, conditions=("noise",), quiet=True)


def test_an_end_token_ends_a_text_and_only_its_own(
    runs: SimpleNamespace, result: dict[str, Any], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    full = result["entries"][0]
    [first, *_] = AutoTokenizer.from_pretrained(tiny_llama)(full["source_alone"])["input_ids"]
    original = Models.load

    def ending(both: Models, name: str) -> Any:
        loaded = original(both, name)
        if name == "llama":
            loaded.model.generation_config.eos_token_id = [2, first]
        return loaded

    monkeypatch.setattr(Models, "load", ending)
    [stopped] = generate(load_adapter(runs.both), TEXTS[:1], max_new_tokens=NEW, quiet=True)["entries"]
    assert stopped["source_alone"] == transformers_text(tiny_llama, TEXTS[0], eos_token_id=[2, first])
    assert len(stopped["source_alone"]) < len(full["source_alone"])
    texts, before = (entry["target_to_source"]["mistral:2->llama:2"] for entry in (stopped, full))
    # One row of the batch is done at once; the others go on, and what it would go on with is not its text.
    assert texts["self"] == stopped["source_alone"]
    assert texts["mapped"] == before["mapped"]
    assert len(texts["mapped"]) >= NEW


@pytest.mark.parametrize(("source", "target"), [("llama", "mistral"), ("mistral", "llama")])
def test_hidden_positions_keep_the_targets_own_state(
    runs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, source: str, target: str
) -> None:
    seen: dict[str, list[Any]] = {"llama": [], "mistral": []}
    reads: dict[str, Any] = {}
    original, read = module.aligned, module._read

    def spy(own: torch.Tensor, *args: Any, **options: Any) -> Any:
        injection = original(own, *args, **options)
        seen[{48: "llama", 32: "mistral"}[own.shape[-1]]].append(injection)
        return injection

    def remember(loaded: Any, *args: Any) -> Any:
        reads[loaded.name] = read(loaded, *args)
        return reads[loaded.name]

    monkeypatch.setattr(module, "aligned", spy)
    monkeypatch.setattr(module, "_read", remember)
    # Llama's newline is a sink; Mistral's start token is special. The first prompt is shorter: it is padded.
    generate(load_adapter(runs.both), (TEXTS[0], TEXTS[1]), max_new_tokens=1, quiet=True)
    there, here = reads[source], reads[target]
    assert (reads["llama"].sinks[1] & ~reads["llama"].windows[1].special).any()
    assert reads["mistral"].windows[1].special[0]
    assert here.first(0) > 0
    assert here.first(1) == 0
    assert [injection.layer for injection in seen[target]] == [2] * 5
    for row in (0, 1):
        taken = source_positions(there.windows[row], here.windows[row])
        kept = np.array([t < 0 or here.sinks[row][i] or there.sinks[row][t] for i, t in enumerate(taken)])
        if row:
            assert kept.sum() > (1 if target == "mistral" else 0)
        assert (~kept).sum() > 2
        for injection in seen[target]:
            own, hidden = (states[row, here.first(row) :] for states in (here.states[2], injection.hidden))
            assert torch.equal(hidden[kept], own[kept])
            assert (
                injection.replaced[row].nonzero()[:, 0].tolist() == (here.first(row) + np.flatnonzero(~kept)).tolist()
            )
        # The first one is the mapped one: there every other position is new.
        own, hidden = (states[row, here.first(row) :] for states in (here.states[2], seen[target][0].hidden))
        assert not torch.isclose(hidden[~kept], own[~kept]).all(dim=1).any()


def test_a_prompt_longer_than_the_context_is_refused(runs: SimpleNamespace) -> None:
    with pytest.raises(SpecError, match=r"prompt 'word word .*exceeds the context of 'llama' \(1024\); shorten it"):
        generate(load_adapter(runs.one), ["word " * 1100], max_new_tokens=4, quiet=True)
    with pytest.raises(SpecError, match="smaller --max-new-tokens"):
        generate(load_adapter(runs.one), ["word"], max_new_tokens=1024, quiet=True)


def test_a_layer_the_run_lacks_is_named(runs: SimpleNamespace) -> None:
    with pytest.raises(SpecError, match="--layers 1: this run maps layers 2"):
        generate(load_adapter(runs.one), TEXTS[:1], layers="1", quiet=True)


def test_another_model_is_refused(runs: SimpleNamespace, tiny_mistral: Path) -> None:
    with pytest.raises(AdapterError, match="point to the right model"):
        generate(load_adapter(runs.one), TEXTS[:1], overrides=(f"llama={tiny_mistral}",), quiet=True)


# How likely the receiving model's own text stays.


def own_nats(path: Path, prompt: str, said: list[int]) -> float:
    """Nats per token of a continuation, in one pass without a cache."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    start = AutoTokenizer.from_pretrained(path)(prompt)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([[*start, *said]])).logits[0, len(start) - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits.double(), torch.tensor(said)))


def test_the_likelihood_is_that_of_the_receivers_own_text(
    runs: SimpleNamespace, tiny_llama: Path, tiny_mistral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[list[list[int]]] = []
    scored: list[Any] = []
    go_on, score = module.continue_from, module.score_continuation

    def heard(*args: Any, **options: Any) -> Any:
        said.append(go_on(*args, **options))
        return said[-1]

    def asked(model: Any, ids: Any, continuation: Any, **options: Any) -> Any:
        scored.append((continuation, options["injection"]))
        return score(model, ids, continuation, **options)

    monkeypatch.setattr(module, "continue_from", heard)
    monkeypatch.setattr(module, "score_continuation", asked)
    result = generate(load_adapter(runs.both), TEXTS, max_new_tokens=NEW, quiet=True)
    own = {"llama": said[0], "mistral": said[1]}
    for i, entry in enumerate(result["entries"]):
        for role, name, path in (("source", "llama", tiny_llama), ("target", "mistral", tiny_mistral)):
            nats = entry["likelihood"][f"{role}_alone"]
            assert nats == pytest.approx(own_nats(path, TEXTS[i], own[name][i]), abs=1e-4)
        for role, alone in (("source_to_target", "target_alone"), ("target_to_source", "source_alone")):
            [nats] = entry["likelihood"][role].values()
            assert set(nats) == CONDITIONS
            assert nats["self"] == entry["likelihood"][alone]
    assert "nats per token" in result["likelihood"]
    # The receiving model's own text is scored, and every time under what was put in for the text beside it.
    assert [continuation for continuation, _ in scored] == [own["llama"], own["mistral"]] + [own["mistral"]] * 5 + [
        own["llama"]
    ] * 5
    changed = [injection for _, injection in scored if injection is not None]
    assert len({id(injection) for injection in changed}) == 10
    for role in ("source_to_target", "target_to_source"):
        told = [next(iter(entry["likelihood"][role].values())) for entry in result["entries"]]
        assert any(nats["mapped"] != nats["self"] for nats in told)
        assert any(nats["mapped"] != nats["shuffled"] for nats in told)
    first = result["entries"][0]["likelihood"]["target_alone"]
    assert f"[{first:.2f}]" in describe(result)


def test_sampled_texts_share_their_random_numbers(runs: SimpleNamespace, result: dict[str, Any]) -> None:
    adapter = load_adapter(runs.both)
    options: dict[str, Any] = {"max_new_tokens": NEW, "quiet": True}
    drawn = generate(adapter, TEXTS, sample=Sampling(30.0, 0.9, 5), **options)
    assert drawn["decoding"] == "sampled (temperature 30, top-p 0.9, seed 5)"
    for entry in drawn["entries"]:
        # The same predictions and the same numbers: the same text.
        assert entry["source_to_target"]["llama:2->mistral:2"]["self"] == entry["target_alone"]
        assert entry["target_to_source"]["mistral:2->llama:2"]["self"] == entry["source_alone"]
    texts, greedy, other = (
        [entry["target_alone"] for entry in found["entries"]]
        for found in (drawn, result, generate(adapter, TEXTS, sample=Sampling(30.0, 0.9, 6), **options))
    )
    assert texts != greedy
    assert texts != other
    with pytest.raises(SpecError, match="temperature 0"):
        Sampling(0.0)


def test_how_prompts_are_batched_changes_no_text(
    runs: SimpleNamespace, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = load_adapter(runs.both)
    sample = Sampling(30.0, 0.9, 5)
    turned = TEXTS[::-1]
    together = generate(adapter, turned, max_new_tokens=NEW, sample=sample, quiet=True)
    monkeypatch.setattr(module, "_BATCH", 2)
    apart = generate(adapter, TEXTS, max_new_tokens=NEW, quiet=True)
    roles = ("source_alone", "target_alone", "source_to_target", "target_to_source")
    for one, two in zip(apart["entries"], result["entries"], strict=True):
        assert {role: one[role] for role in roles} == {role: two[role] for role in roles}
        assert one["likelihood"]["target_alone"] == pytest.approx(two["likelihood"]["target_alone"], abs=1e-4)
    # A draw depends on the prompt's number, not on its batch: the last one is alone in its own, and gives a text.
    drawn = generate(adapter, turned, max_new_tokens=NEW, sample=sample, quiet=True)
    assert drawn["entries"][-1]["target_alone"]
    for one, two in zip(drawn["entries"], together["entries"], strict=True):
        assert one["target_alone"] == two["target_alone"]


def test_no_prompt_is_refused(runs: SimpleNamespace) -> None:
    with pytest.raises(SpecError, match="there is no prompt to continue"):
        generate(load_adapter(runs.one), [], quiet=True)


# Prompts.


def test_the_five_prompts_are_the_default() -> None:
    assert read_prompts(None) == PROMPTS
    assert len(PROMPTS) == 5
    assert PROMPTS[0] == "The capital of France is"


def test_a_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("One\r\n  two, with spaces \nnaïve 東京".encode())
    assert read_prompts(path) == ("One", "  two, with spaces ", "naïve 東京")
    # A byte order mark is no part of the first prompt, empty lines at the end are no prompts, and nothing but a line
    # feed ends one.
    path.write_bytes("One\u2028and a half\x0c\nTwo\n\n \n".encode("utf-8-sig"))
    assert read_prompts(path) == ("One\u2028and a half\x0c", "Two")


def test_an_empty_line_between_prompts_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("One\n\nTwo\n", encoding="utf-8")
    with pytest.raises(SpecError, match=r"p\.txt: line 2 is empty; write one prompt a line and remove it"):
        read_prompts(path)


@pytest.mark.parametrize("content", [b"", b"\n \n\t\n"])
def test_a_file_without_a_prompt_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(content)
    with pytest.raises(SpecError, match="holds no prompt; write one a line"):
        read_prompts(path)


@pytest.mark.parametrize("kind", ["missing", "directory", "latin-1"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, kind: str) -> None:
    path = {"missing": tmp_path / "none.txt", "directory": tmp_path, "latin-1": tmp_path / "p.txt"}[kind]
    if kind == "latin-1":
        path.write_bytes("naïve".encode("latin-1"))
    with pytest.raises(SpecError, match=r"cannot be read .*; give a UTF-8 file, one prompt a line") as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)


def test_the_command_writes_what_it_prints(
    runs: SimpleNamespace, result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("\n".join((TEXTS[0], TEXTS[2])), encoding="utf-8")
    base = ("evaluate", "generate", "--adapter", runs.both, "--prompts", prompts, "--max-new-tokens", NEW)
    shown = call(capsys, *base, "--out", tmp_path, "--json").json
    assert shown == strict_json((tmp_path / "generations.json").read_text(encoding="utf-8"))
    assert [entry["target_alone"] for entry in shown["entries"]] == [
        result["entries"][i]["target_alone"] for i in (0, 2)
    ]
    assert not (runs.both / "generations.json").exists()
    text = call(capsys, *base, "--out", tmp_path)
    assert text.code == 0
    assert TEXTS[0] in text.out
    assert "loading llama" in text.err
