"""What does not fit together is refused in one line, before the wait for a model's weights wherever it can be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from align.maps.fitted import Adapter, Aligner, load_adapter
from align.runs.train import train
from align.settings import Settings
from evaluate.generation.generate import generate
from evaluate.injection.loading import Loaded, Models, adopt, check, choose, load
from evaluate.stitching.stitch import scored_windows, stitch
from featstore.errors import AdapterError, ModelLoadError, SpecError, StoreStateError
from featstore.models.loading import load_model
from featstore.models.references import ModelSpec
from featstore.models.trust import remember
from featstore.models.weights import sampled_fingerprint, weights_fingerprint
from featstore.store import open_store
from tests.support.checkpoints import edit, silence_a_head, spec_of
from tests.support.commands import call


@pytest.fixture(scope="module")
def pair(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Maps between two models of different width, depth and tokenizer, in both directions."""
    run = tmp_path_factory.mktemp("pair") / "run"
    train(Settings(str(tiny_store), "affine", both=True), run, quiet=True)
    return SimpleNamespace(store=open_store(tiny_store), run=run, adapter=load_adapter(run))


def with_card(adapter: Adapter, **parts: Any) -> Adapter:
    return Adapter(adapter.directory, {**adapter.card, **parts}, adapter.aligners)


def test_another_store_is_refused(pair: SimpleNamespace) -> None:
    words = r"was fitted from a store with fingerprint .* use the store named in its card"
    other = with_card(pair.adapter, store={**pair.adapter.card["store"], "fingerprint": "f" * 64})
    with pytest.raises(AdapterError, match=words):
        stitch(pair.store, other, quiet=True)


def test_a_store_that_was_rebuilt_is_the_same_only_where_nothing_changed(pair: SimpleNamespace) -> None:
    store = open_store(pair.store.path)
    past = {"fingerprint_before": "f" * 64, "fingerprint_after": store.fingerprint, "changed": True}
    store.attributes["rebuilt"] = [past]
    old = with_card(pair.adapter, store={**pair.adapter.card["store"], "fingerprint": "f" * 64})
    with pytest.raises(AdapterError, match=r"was fitted before .* was rebuilt, over other pairs .* `align train`"):
        stitch(store, old, quiet=True)
    past["changed"] = False
    assert stitch(store, old, layers="2", max_tokens=1, quiet=True)["pairs"]
    past["fingerprint_after"] = "e" * 64  # and then got more text
    with pytest.raises(AdapterError, match="use the store named in its card"):
        stitch(store, old, quiet=True)


def test_another_model_is_refused(pair: SimpleNamespace, tiny_llama: Path, tiny_mistral: Path) -> None:
    for override, what in ((f"mistral={tiny_llama}", "depth"), (f"llama={tiny_mistral}", "depth")):
        with pytest.raises(AdapterError, match=rf"has {what} .* point to the right model with --model"):
            stitch(pair.store, pair.adapter, overrides=(override,), max_tokens=1, quiet=True)


def test_the_same_weights_with_another_tokenizer_are_refused(
    pair: SimpleNamespace, tiny_mistral: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(tiny_mistral, tmp_path / "moved")
    result = stitch(pair.store, pair.adapter, layers="2", overrides=(f"mistral={moved}",), max_tokens=1, quiet=True)
    assert result["pairs"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / name, moved / name)
    with pytest.raises(AdapterError, match=r"model 'mistral' .* has tokenizer"):
        stitch(pair.store, pair.adapter, layers="2", overrides=(f"mistral={moved}",), max_tokens=1, quiet=True)


@pytest.mark.parametrize(
    ("key", "what", "wanted"),
    [
        ("depth", "depth", 9),
        ("width", "width", 33),
        ("config_sha256", "configuration", "0" * 64),
        ("tokenizer_sha256", "tokenizer", "1" * 64),
    ],
)
def test_whatever_differs_of_a_model_is_named(pair: SimpleNamespace, key: str, what: str, wanted: int | str) -> None:
    models = pair.adapter.card["models"]
    other = with_card(pair.adapter, models={**models, "mistral": {**models["mistral"], key: wanted}})
    words = rf"model 'mistral' .* has {what} .* was fitted to {str(wanted)[:12]}; point to the right model"
    # A configuration only claims depth and width: what is compared is measured on the loaded model.
    measured = key in ("depth", "width")
    with pytest.raises(AdapterError, match=words):
        load(other, "mistral", (), quiet=True) if measured else check(other, "mistral", ())
    assert check(other, "llama", ()).info.width == 48


def test_a_model_is_looked_for_where_its_card_or_the_override_says(
    pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(spec: ModelSpec, control_tokens: str) -> None:
        raise ModelLoadError(f"{spec.ref} at {spec.revision}, control tokens as {control_tokens}")

    monkeypatch.setattr("featstore.models.loading.inspect_model", gone)
    models = pair.adapter.card["models"]
    moved = {**models["mistral"], "reference": "org/name", "revision": "abc123"}
    adapter = with_card(pair.adapter, models={**models, "mistral": moved})
    remember([ModelSpec("mine", "org/name", "abc123")])
    with pytest.raises(ModelLoadError, match="org/name at abc123, control tokens as text"):
        check(adapter, "mistral", ())
    kept = with_card(adapter, corpus={**adapter.card["corpus"], "control_tokens": "special"})
    with pytest.raises(ModelLoadError, match="control tokens as special"):
        check(kept, "mistral", ())
    with pytest.raises(ModelLoadError, match="other/name at None"):
        check(adapter, "mistral", ("mistral=other/name",))


def test_a_model_attends_as_it_did_when_its_states_were_extracted(pair: SimpleNamespace) -> None:
    models = pair.adapter.card["models"]
    for attention in ("eager", "sdpa"):
        adapter = with_card(pair.adapter, models={**models, "llama": {**models["llama"], "attention": attention}})
        assert load(adapter, "llama", (), device="cpu", quiet=True).model.config._attn_implementation == attention


def test_layers_are_those_of_the_model_that_is_read_from(pair: SimpleNamespace) -> None:
    # The last layers of two models of unequal depth.
    found = [aligner.pair.key for aligner in choose(pair.adapter, "100%")]
    assert found == ["llama:3->mistral:4", "mistral:4->llama:3"]


def test_a_sink_at_one_layer_is_a_sink() -> None:
    nothing: Any = None
    loaded = Loaded("a", nothing, nothing, nothing, {0: 1.0, 2: 10.0}, 4.0)
    first, second = ([[3.0, 0.0], [0.0, 5.0], [0.0, 0.0]], [[0.0, 39.0], [0.0, 0.0], [41.0, 0.0]])
    found = loaded.is_sink({0: torch.tensor(first), 2: torch.tensor(second)})
    assert found.tolist() == [False, True, True]


def test_models_at_hand_are_neither_looked_for_nor_loaded(
    pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {name: load(pair.adapter, name, (), device="cpu", quiet=True) for name in ("llama", "mistral")}

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was looked for")

    monkeypatch.setattr("featstore.models.loading.inspect_model", refuse)
    monkeypatch.setattr("featstore.models.loading.load_model", refuse)
    options: dict[str, Any] = {"layers": "2", "models": models, "quiet": True}
    assert stitch(pair.store, pair.adapter, max_tokens=1, source_alone=True, **options)["pairs"]
    assert generate(pair.adapter, ["One"], max_new_tokens=1, **options)["entries"]


def with_fingerprint(adapter: Adapter, model: str, fingerprint: str, dtype: str = "float32") -> Adapter:
    """The adapter as a store that recorded the weights would have it."""
    entry = {**adapter.card["models"][model], "weights_fingerprint": fingerprint, "compute_dtype": dtype}
    # As cards were before there was a fingerprint of whole files: the sample has the name by itself.
    del entry["weights_sample"]
    models = {**adapter.card["models"], model: entry}
    return Adapter(adapter.directory, {**adapter.card, "models": models}, adapter.aligners)


@pytest.fixture(scope="module")
def tuned(tiny_mistral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Mistral after a step of training: another function under the same configuration and tokenizer."""
    from safetensors.torch import load_file, save_file

    moved = shutil.copytree(tiny_mistral, tmp_path_factory.mktemp("tuned") / "mistral")
    tensors = load_file(moved / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name] = tensors[name] * 1.05
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    return moved


def test_a_fine_tune_of_the_model_is_refused(pair: SimpleNamespace, tiny_mistral: Path, tuned: Path) -> None:
    spec = ModelSpec("mistral", str(tiny_mistral))
    fingerprint = sampled_fingerprint(load_model(spec, device="cpu", dtype="float32"))
    fitted = with_fingerprint(pair.adapter, "mistral", fingerprint)
    override = (f"mistral={tuned}",)
    words = r"model 'mistral' \(.*\) has weights .* fitted to .* point to the right model with --model mistral=REF"
    with pytest.raises(AdapterError, match=words):
        load(fitted, "mistral", override, device="cpu")
    assert load(fitted, "mistral", (), device="cpu").name == "mistral"
    # The dtype it is run in does not matter.
    assert load(fitted, "mistral", (), device="cpu", dtype="bfloat16").name == "mistral"
    with pytest.raises(AdapterError, match="has weights"):
        load(fitted, "mistral", override, device="cpu", dtype="bfloat16")
    # The other model of the run is not meant.
    assert load(fitted, "llama", (), device="cpu").name == "llama"


@pytest.fixture(scope="module")
def silenced(tiny_mistral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Mistral without one of its heads: no value of a sample tells."""
    return edit(shutil.copytree(tiny_mistral, tmp_path_factory.mktemp("silenced") / "mistral"), silence_a_head)


def test_an_edited_head_is_refused_before_the_wait_for_weights(
    pair: SimpleNamespace, tiny_mistral: Path, silenced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = {sampled_fingerprint(load_model(spec_of(p), device="cpu")) for p in (tiny_mistral, silenced)}
    assert samples == {pair.adapter.card["models"]["mistral"]["weights_sample"]}
    monkeypatch.setattr("featstore.models.loading.load_model", None)
    words = r"model 'mistral' \(.*\) has weights [0-9a-f]{12}, the run was fitted to [0-9a-f]{12} under the same"
    with pytest.raises(AdapterError, match=words):
        Models(pair.adapter, ["llama", "mistral"], (f"mistral={silenced}",), device="cpu", quiet=True)


def test_weights_that_arrive_only_with_loading_are_compared_then(
    pair: SimpleNamespace, silenced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a hub model that is downloaded when it is loaded."""
    monkeypatch.setattr("evaluate.injection.loading.weights_fingerprint", lambda *_, **__: None)
    with pytest.raises(AdapterError, match="has weights"):
        load(pair.adapter, "mistral", (f"mistral={silenced}",), device="cpu", quiet=True)


def test_a_loaded_model_that_is_handed_over_is_compared(
    pair: SimpleNamespace, tiny_mistral: Path, tuned: Path, silenced: Path
) -> None:
    loaded = load(pair.adapter, "mistral", (), device="cpu", quiet=True)
    assert loaded.weights.whole == weights_fingerprint(spec_of(tiny_mistral))
    assert adopt(pair.adapter, "mistral", loaded).weights == loaded.weights
    # Loaded for a run that does not know the weights, then handed to one that does.
    card = {**pair.adapter.card["models"]["mistral"], "weights_fingerprint": None, "weights_sample": None}
    unaware = with_card(pair.adapter, models={**pair.adapter.card["models"], "mistral": card})
    for place in (tuned, silenced):
        other = load(unaware, "mistral", (f"mistral={place}",), device="cpu", quiet=True)
        with pytest.raises(AdapterError, match="has weights"):
            adopt(pair.adapter, "mistral", other)
    # A module has no files: its sample is compared.
    assert adopt(pair.adapter, "mistral", load_model(spec_of(tiny_mistral), device="cpu")).weights.whole is None
    with pytest.raises(AdapterError, match="has weights"):
        adopt(pair.adapter, "mistral", load_model(spec_of(tuned), device="cpu"))
    # Weights that were edited in memory are none of the files'.
    with torch.no_grad():
        loaded.model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(AdapterError, match="has weights"):
        adopt(pair.adapter, "mistral", loaded)


def test_weights_are_compared_only_where_both_sides_know_them(pair: SimpleNamespace, tuned: Path) -> None:
    override = (f"mistral={tuned}",)
    card = pair.adapter.card["models"]["mistral"]
    unrecorded = {**card, "weights_fingerprint": None, "weights_sample": None}
    old = Adapter(pair.run, {**pair.adapter.card, "models": {"mistral": unrecorded}}, pair.adapter.aligners)
    assert load(old, "mistral", override, device="cpu").name == "mistral"
    # float16 loses what bfloat16 keeps of the smallest weights: between the two nothing can be said.
    other = with_fingerprint(pair.adapter, "mistral", "0" * 64, dtype="float16")
    assert load(other, "mistral", override, device="cpu").name == "mistral"
    with pytest.raises(AdapterError, match="has weights"):
        load(other, "mistral", override, device="cpu", dtype="float16")


def test_an_override_of_a_model_the_run_does_not_have_is_refused(pair: SimpleNamespace, tiny_llama: Path) -> None:
    with pytest.raises(SpecError, match=r"--model gemma=\.\.\.: this run has llama, mistral"):
        stitch(pair.store, pair.adapter, overrides=(f"gemma={tiny_llama}",), quiet=True)


def test_a_model_that_is_gone_is_named(pair: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="mistral"):
        stitch(pair.store, pair.adapter, overrides=(f"mistral={tmp_path / 'gone'}",), max_tokens=1, quiet=True)


def test_a_dtype_that_does_not_exist_is_not_blamed_on_the_model(tiny_llama: Path) -> None:
    with pytest.raises(SpecError, match=r"^dtype 'int4': choose one of auto, bfloat16"):
        load_model(ModelSpec("llama", str(tiny_llama)), device="cpu", dtype="int4")


def test_a_layer_the_run_does_not_map_is_named(pair: SimpleNamespace) -> None:
    with pytest.raises(SpecError, match="--layers 1: this run maps layers 0, 2, 3, 4"):
        stitch(pair.store, pair.adapter, layers="1", quiet=True)


def test_a_model_that_the_store_lacks_is_named(pair: SimpleNamespace) -> None:
    with pytest.raises(StoreStateError, match="no model 'gemma'"):
        scored_windows(pair.store, "gemma", "mistral")


# Runs that are damaged.


@pytest.mark.parametrize(
    ("path", "lacks"),
    [
        (("type",), "type"),
        (("store",), "store.fingerprint"),
        (("store", "fingerprint"), "store.fingerprint"),
        (("mask",), "mask.sink_threshold"),
        (("mask", "sink_threshold"), "mask.sink_threshold"),
        (("models",), "models.llama.reference"),
        (("models", "mistral"), "models.mistral.reference"),
        (("models", "llama", "median_norm"), "models.llama.median_norm"),
        (("models", "mistral", "width"), "models.mistral.width"),
    ],
)
def test_a_card_that_lacks_something_is_refused(pair: SimpleNamespace, path: tuple[str, ...], lacks: str) -> None:
    card = json.loads(json.dumps(pair.adapter.card))
    at = card
    for key in path[:-1]:
        at = at[key]
    del at[path[-1]]
    broken = Adapter(pair.run, card, pair.adapter.aligners)
    for use in (lambda: stitch(pair.store, broken, quiet=True), lambda: generate(broken, ["One"], quiet=True)):
        with pytest.raises(AdapterError, match=rf"the card of .* lacks {lacks}; train it again"):
            use()


def test_a_run_without_a_map_is_refused(pair: SimpleNamespace) -> None:
    with pytest.raises(AdapterError, match="holds no map; train it again"):
        choose(Adapter(pair.run, pair.adapter.card, {}), None)


@pytest.mark.parametrize("name", ["weight", "control_mean"])
def test_a_map_that_is_no_number_is_refused(pair: SimpleNamespace, name: str) -> None:
    key, aligner = next(iter(pair.adapter.aligners.items()))
    tensor = aligner.tensors[name].copy()
    tensor.flat[-1] = np.nan
    broken = Aligner(aligner.pair, {**aligner.tensors, name: tensor})
    with pytest.raises(AdapterError, match=rf"{key}: {name} in .* holds NaN or infinity; train it again"):
        choose(Adapter(pair.run, pair.adapter.card, {key: broken}), None)


# Before the wait for the weights.


@pytest.fixture
def weightless(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("featstore.models.loading.load_model", refuse)


@pytest.mark.usefixtures("weightless")
@pytest.mark.parametrize("model", ["llama", "mistral"])
def test_every_model_is_looked_for_before_one_is_loaded(pair: SimpleNamespace, model: str, tmp_path: Path) -> None:
    gone = (f"{model}={tmp_path / 'gone'}",)
    for use in (
        lambda: stitch(pair.store, pair.adapter, overrides=gone, source_alone=True, quiet=True),
        lambda: stitch(pair.store, pair.adapter, overrides=gone, quiet=True),
        lambda: generate(pair.adapter, ["One"], overrides=gone, quiet=True),
    ):
        with pytest.raises(ModelLoadError, match=f"model '{model}': no directory"):
            use()


@pytest.mark.usefixtures("weightless")
def test_prompts_are_measured_before_a_model_is_loaded(pair: SimpleNamespace) -> None:
    with pytest.raises(SpecError, match=r"prompt 'word word .*exceeds the context of 'llama' \(1024\); shorten it"):
        generate(pair.adapter, ["One", "word " * 1100], quiet=True)
    with pytest.raises(SpecError, match="prompt '' has no tokens under the tokenizer of 'llama'; give it a word"):
        generate(pair.adapter, ["One", ""], quiet=True)


def damaged(run: Path, to: Path, edit: Callable[[bytes], bytes], name: str = "adapter.safetensors") -> Path:
    shutil.copytree(run, to)
    (to / name).write_bytes(edit((to / name).read_bytes()))
    return to


#: What is typed, beside what the command needs anyway, and what the one line says.
STITCH = {
    "--layers 1": "--layers 1: this run maps layers 0, 2, 3, 4",
    "--layers one": "layer 'one': write numbers such as",
    "--layers 99": "layer 99 is outside 0..3 of model 'llama'",
    "--store {tmp}/none": "no store at",
    "--max-tokens 0": "token budget '0': give a positive number",
    "--keep nonsense": "--keep nonsense: choose one of own, hide",
    "--split nonsense": "split 'nonsense': choose one of train, val, test",
    "--out {tmp}/file": "file is a file; choose another directory",
    "--dtype int4": "dtype 'int4': choose one of",
    "--model gemma=x": "--model gemma=...: this run has llama, mistral",
    "--model mistral={tmp}/gone": "model 'mistral': no directory",
    "--model mistral={llama}": "has depth 3, the run was fitted to 4; point to the right model with --model",
    "--adapter {tmp}": "has no adapter.json; make one with `align train`",
    "--adapter {tmp}/cut": "is damaged",
    "--adapter {tmp}/nan": "holds NaN or infinity; the run is damaged: restore it or train it again",
    "--adapter {tmp}/other": "use the store named in its card",
}
GENERATE = {
    "--layers 1": "--layers 1: this run maps layers 0, 2, 3, 4",
    "--max-new-tokens 0": "invalid value '0' for '--max-new-tokens'",
    "--max-new-tokens 5000": "exceeds the context of 'llama' (1024)",
    "--prompts {tmp}/long": "has 1102 tokens; with 32 new ones it exceeds the context",
    "--prompts {tmp}/none": "cannot be read",
    "--prompts {tmp}/file": "holds no prompt; write one a line",
    "--prompts {tmp}/gap": "line 2 is empty; write one prompt a line and remove it",
    "--out {tmp}/file": "file is a file; choose another directory",
    "--model llama={tmp}/gone": "model 'llama': no directory",
    "--model mistral={llama}": "has depth 3, the run was fitted to 4; point to the right model with --model",
    "--adapter {tmp}": "has no adapter.json; make one with `align train`",
    "--adapter {tmp}/cut": "is damaged",
    "--temperature 2": "--temperature and --top-p need --sample",
    "--sample --top-p 0": "top_p 0.0: must be above 0",
}


@pytest.fixture(scope="module")
def broken(pair: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of runs and files that cannot be used."""
    tmp = tmp_path_factory.mktemp("broken")
    damaged(pair.run, tmp / "cut", lambda content: content[:-100])
    # Of the tensors' bytes the last are a number of the last one.
    damaged(pair.run, tmp / "nan", lambda content: content[:-4] + np.float32(np.nan).tobytes())
    fingerprint = pair.store.fingerprint.encode()
    damaged(pair.run, tmp / "other", lambda card: card.replace(fingerprint, b"f" * 64), "adapter.json")
    for name, content in (("file", ""), ("gap", "One\n\nTwo\n"), ("long", "word " * 1100)):
        (tmp / name).write_text(content, encoding="utf-8")
    return tmp


@pytest.mark.usefixtures("weightless")
@pytest.mark.parametrize(
    ("command", "typed", "says"),
    [
        *(pytest.param("stitch", typed, says, id=f"stitch {typed}") for typed, says in STITCH.items()),
        *(pytest.param("generate", typed, says, id=f"generate {typed}") for typed, says in GENERATE.items()),
    ],
)
def test_a_command_refuses_in_one_line(
    pair: SimpleNamespace,
    broken: Path,
    tiny_llama: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    typed: str,
    says: str,
) -> None:
    words = [word.format(tmp=broken, llama=tiny_llama) for word in typed.split()]
    base = ["--adapter", pair.run, *(["--store", pair.store.path] if command == "stitch" else [])]
    # No line says that weights are being loaded.
    refusal = call(capsys, "evaluate", command, *base, *words).refusal
    assert says in refusal
    assert not list(pair.run.glob("stitch*")) + list(pair.run.glob("generations*"))
