"""`import evaluate`: the commands as functions, results in a notebook, and states injected into a loop of one's own."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from copy import deepcopy
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import typer
from rich.console import Console

import evaluate
import evaluate.cli
from align.maps.fitted import Adapter, load_adapter
from align.runs.train import train
from align.settings import LoopSettings, Settings
from evaluate.injection.loading import Loaded, adopt
from evaluate.injection.wire import wire
from evaluate.results import read_communication, read_generations, read_stitch
from evaluate.stitching.windows import Window, scored_windows
from featstore.errors import AdapterError, FeatstoreError, LayerRangeError, ModelLoadError, SpecError
from featstore.models import residual as sites
from featstore.models.injection import aligned, inject
from featstore.models.stack import residual_stream
from featstore.store import Store, open_store
from tests.support import ROOT
from tests.support.commands import call, strict_json

KEY, BACK = "llama:2->mistral:2", "mistral:2->llama:2"
PROMPTS = ["The capital of France is", "naïve 東京, and a longer prompt of more tokens:"]


@pytest.fixture(scope="module")
def run(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Maps between two models of different width, depth and tokenizer, in both directions."""
    out = tmp_path_factory.mktemp("api") / "run"
    train(Settings(str(tiny_store), "affine", both=True, layers="2"), out, quiet=True)
    return out


@pytest.fixture(scope="module")
def compressed(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A map of windows."""
    out = tmp_path_factory.mktemp("api") / "compress"
    loop = LoopSettings(epochs=1, latents=4, latent_dim=8, batch_size=8, tracker="none")
    train(Settings(str(tiny_store), "compress", layers="2", loop=loop), out, quiet=True)
    return out


@pytest.fixture(scope="module")
def models(run: Path) -> dict[str, Loaded]:
    return evaluate.load_models(run, device="cpu", quiet=True)


@pytest.fixture(scope="module")
def store(tiny_store: Path) -> Store:
    return open_store(tiny_store)


@pytest.fixture(scope="module")
def window(store: Store) -> Window:
    return scored_windows(store, "llama", "mistral", max_tokens=1)[0]


def source_rows(store: Store, window: Window) -> Any:
    """The stored source states at the tokens that the window's places take."""
    rows = store.rows("llama", 2)[window.source_row : window.source_row + len(window.source.ids)]
    return rows[window.taken[window.places]]


def ids_of(window: Window) -> torch.Tensor:
    return torch.from_numpy(window.target.ids.astype(np.int64))[None]


# The package.


def test_importing_the_package_and_its_functions_takes_no_heavy_library() -> None:
    code = (
        "import sys, evaluate; assert callable(evaluate.stitch); assert 'inject' in dir(evaluate); "
        "print(sorted(set(sys.modules) & {'torch', 'transformers', 'matplotlib', 'dask', 'pandas', 'scipy'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_every_name_is_there_and_no_module_has_it() -> None:
    modules = {path.stem if path.is_file() else path.name for path in (ROOT / "evaluate").iterdir()}
    assert dir(evaluate) == sorted(evaluate.__all__)
    for name in evaluate.__all__:
        assert getattr(evaluate, name).__name__ == name
        assert name not in modules
        assert inspect.getdoc(getattr(evaluate, name))
    with pytest.raises(AttributeError, match="no attribute 'sew'"):
        evaluate.sew  # noqa: B018


@pytest.mark.parametrize("name", ["stitch", "generate", "communicate", "report"])
def test_keywords_and_defaults_are_the_commands(name: str) -> None:
    command = typer.main.get_command(evaluate.cli.app).commands[name]  # type: ignore[attr-defined]
    flags = {option.opts[-1].lstrip("-").replace("-", "_"): option for option in command.params}
    del flags["json"]
    parameters = inspect.signature(getattr(evaluate, name)).parameters
    renamed = {"adapter": "run", "model": "models", "directories": "dirs"}
    assert {renamed.get(flag, flag) for flag in flags} == set(parameters) - {"write", "quiet"}
    for flag, option in flags.items():
        parameter = parameters[renamed.get(flag, flag)]
        if parameter.default is not inspect.Parameter.empty and flag != "task":
            default = str(option.default) if flag == "out" and name == "report" else option.default
            assert parameter.default == default, flag


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    found = call(capsys, "evaluate", "--version")
    assert found.code == 0
    assert found.out.startswith("evaluate ")
    assert found.out.count("\n") == 1


# Stitch, generate, communicate, report.


def test_stitch_gives_what_the_command_writes(
    run: Path, store: Store, models: dict[str, Loaded], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--layers", "2", "--max-tokens", "200", "--seed", "3", "--device", "cpu", "--out", tmp_path / "command"]
    printed = call(capsys, "evaluate", "stitch", "--store", store.path, "--adapter", run, *words, "--json").json
    result = evaluate.stitch(
        store, run, layers=[2], max_tokens=200, seed=3, models=models, out=tmp_path / "call", quiet=True
    )
    written = [(tmp_path / where / "stitch.json").read_bytes() for where in ("command", "call")]
    assert written[0] == written[1]
    assert result.content() == printed == strict_json(written[0].decode())
    assert result.path == tmp_path / "call" / "stitch.json"
    assert not (run / "stitch.json").exists()

    mapped = result.pairs[KEY].conditions["mapped"]
    assert mapped is not None
    table = result.to_pandas().set_index(["pair", "condition"])
    assert table.loc[(KEY, "mapped"), "nats_per_token"] == mapped.nats_per_token
    measured = [name for name, losses in result.pairs[KEY].conditions.items() if losses is not None]
    assert list(table.loc[KEY].index) == measured
    assert {"clean", "self", "mapped", "mean"} < set(measured)
    again = type(result).read(tmp_path / "call")
    assert again.content() == result.content() == read_stitch(tmp_path / "call").content()


def test_stitch_takes_paths_a_run_with_a_path_and_references(
    run: Path, tiny_store: Path, tiny_mistral: Path, models: dict[str, Loaded]
) -> None:
    options: dict[str, Any] = {"max_tokens": 60, "write": False, "quiet": True, "layers": 2, "device": "cpu"}
    first = evaluate.stitch(str(tiny_store), SimpleNamespace(path=run), models=models, **options)
    moved = {"mistral": tiny_mistral, "llama": models["llama"].model}
    assert evaluate.stitch(tiny_store, str(run), models=moved, **options).content() == first.content()
    listed = [f"mistral={tiny_mistral}"]
    assert evaluate.stitch(tiny_store, run, models=listed, **options).content() == first.content()
    assert first.path is None
    assert not (run / "stitch.json").exists()


def test_generate_gives_what_the_command_writes(
    run: Path, models: dict[str, Loaded], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    words = ["--prompts", prompts, "--max-new-tokens", 4, "--device", "cpu", "--out", tmp_path, "--json"]
    printed = call(capsys, "evaluate", "generate", "--adapter", run, *words).json
    options: dict[str, Any] = {"max_new_tokens": 4, "models": models, "quiet": True, "write": False}
    result = evaluate.generate(run, PROMPTS, **options)
    assert result.content() == printed == read_generations(tmp_path).content()
    assert evaluate.generate(run, prompts, **options).content() == result.content()
    [alone] = evaluate.generate(run, PROMPTS[0], **options).entries
    assert alone.prompt == PROMPTS[0]
    table = result.to_pandas()
    assert set(table["condition"]) == {"alone", "mapped", "self", "mean", "random_norm", "shuffled"}
    drawn = [evaluate.generate(run, PROMPTS[:1], sample=True, top_p=p, **options) for p in (0.9, 1e-6)]
    assert drawn[0].decoding == "sampled (temperature 1, top-p 0.9, seed 0)"
    # Of next to no probability only the likeliest token is left.
    assert drawn[1].entries[0].target_alone == alone.target_alone


def test_communicate_gives_what_the_command_writes(
    run: Path,
    models: dict[str, Loaded],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--task", "lookup:2", "--task", "tipsheets", "--examples", 3, "--device", "cpu", "--out", tmp_path]
    done = call(capsys, "evaluate", "communicate", "--adapter", run, *words, "--max-new-tokens", 2, "--json")
    # One model at a time: a task in both directions has three turns, and the next begins with the model that is there.
    assert done.err.count("loading") == 5
    result = evaluate.communicate(
        run, ["lookup:2", "tipsheets"], examples=3, max_new_tokens=2, models=models, quiet=True, write=False
    )
    assert result.content() == done.json == read_communication(tmp_path).content()
    assert list(result.tasks) == [
        f"{task} ({way})" for task in ("lookup", "tipsheets") for way in ("llama->mistral", "mistral->llama")
    ]
    assert set(result.to_pandas()["task"]) == set(result.tasks)


def test_report_is_of_directories_and_runs(
    run: Path, tiny_store: Path, models: dict[str, Loaded], tmp_path: Path
) -> None:
    evaluate.stitch(tiny_store, run, max_tokens=60, models=models, out=tmp_path / "run", quiet=True)
    for name in ("adapter.json", "metrics.json", "adapter.safetensors"):
        (tmp_path / "run" / name).write_bytes((run / name).read_bytes())
    pages = []
    for number, dirs in enumerate(([tmp_path / "run"], str(tmp_path / "run"), SimpleNamespace(path=tmp_path / "run"))):
        result = evaluate.report(dirs, out=tmp_path / f"{number}.html")
        assert result.path.read_bytes()[:9].lower() == b"<!doctype"
        pages.append(result.path.read_bytes())
    assert pages[0] == pages[1] == pages[2]
    assert result.maps == 2
    assert "2.html" in result._repr_html_()
    assert repr(result).startswith("ReportResult(")


def test_results_show_themselves(run: Path, tiny_store: Path, models: dict[str, Loaded]) -> None:
    options: dict[str, Any] = {"models": models, "quiet": True, "write": False}
    stitched = evaluate.stitch(tiny_store, run, max_tokens=60, **options)
    texts = evaluate.generate(run, ["[bold]<b>"], max_new_tokens=2, **options)
    answers = evaluate.communicate(run, "lookup:2", examples=2, max_new_tokens=2, **options)
    panels = {
        "StitchResult": (stitched, [KEY, BACK], "stitched loss"),
        "GenerateResult": (texts, [KEY, BACK], "nats/token"),
        "CommunicateResult": (answers, list(answers.tasks), "accuracy"),
    }
    for name, (result, titles, label) in panels.items():
        assert repr(result).startswith(f"{name}(")
        assert "\n" not in repr(result)
        assert repr(result) == str(result)
        output = StringIO()
        Console(width=250, file=output).print(result)
        shown = output.getvalue()
        assert "mapped" in shown or "replace" in shown
        html = result._repr_html_()
        assert html.count("<table>") == len(result.sheets()) == html.count("</table>")
        figure = result.plot()
        assert [axes.get_title() for axes in figure.axes] == titles
        assert all(label in axes.get_xlabel() for axes in figure.axes)
        assert figure._repr_png_().startswith(b"\x89PNG")
        if name == "GenerateResult":
            assert "[bold]<b>" in shown
            assert "[bold]&lt;b&gt;" in html
    drawn = [text.get_text() for text in stitched.plot().axes[0].get_yticklabels()]
    assert drawn == [n for n, losses in stitched.pairs[KEY].conditions.items() if losses is not None]
    assert "raw: not run, widths differ" in stitched._repr_html_()


@pytest.mark.parametrize(
    ("call_it", "kind", "message"),
    [
        (lambda s, r: evaluate.stitch(s, r, split="dev"), SpecError, "split 'dev': choose one of train, val, test"),
        (lambda s, r: evaluate.stitch(s, r, keep="all"), SpecError, "--keep all: choose one of own, hide"),
        (lambda s, r: evaluate.stitch(s, r, max_tokens=0), SpecError, "token budget '0'"),
        (lambda s, r: evaluate.stitch(s, r, layers=[1]), SpecError, "--layers 1: this run maps layers 2"),
        (lambda s, r: evaluate.stitch(s, r, seed=-1), SpecError, "seed -1: give a whole number, 0 or more"),
        (lambda s, r: evaluate.stitch(s, r, out=r / "run.yaml"), SpecError, "run.yaml is a file"),
        (lambda s, r: evaluate.stitch(s / "no", r), FeatstoreError, "no"),
        (lambda s, r: evaluate.stitch(s, s), AdapterError, "it has no adapter.json"),
        (lambda s, r: evaluate.stitch(s, 3), SpecError, "run 3: give a run directory"),
        (lambda s, r: evaluate.stitch(s, r, models="a=b"), SpecError, "models 'a=b': give a list of NAME=REF"),
        (lambda s, r: evaluate.stitch(s, r, models={"gpt": "x"}), SpecError, "--model gpt=...: this run has llama"),
        (lambda s, r: evaluate.stitch(s, r, models={"gpt": object()}), SpecError, "--model gpt=...: this run has"),
        (lambda s, r: evaluate.stitch(s, r, models={"mistral": s}), ModelLoadError, "'mistral'"),
        (lambda s, r: evaluate.generate(r, []), SpecError, "there is no prompt"),
        (lambda s, r: evaluate.generate(r, [3]), SpecError, "prompt 3: give text"),
        (lambda s, r: evaluate.generate(r, s), SpecError, "cannot be read"),
        (lambda s, r: evaluate.generate(r, max_new_tokens=0), SpecError, "max_new_tokens 0"),
        (lambda s, r: evaluate.generate(r, top_p=0.5), SpecError, "--temperature and --top-p need --sample"),
        (lambda s, r: evaluate.communicate(r, "chess"), SpecError, "--task 'chess': choose one of"),
        (lambda s, r: evaluate.communicate(r, []), SpecError, "there is no task"),
        (lambda s, r: evaluate.communicate(r, examples=0), SpecError, "--examples 0"),
        (lambda s, r: evaluate.communicate(r, format="int8"), SpecError, "format 'int8'"),
        (lambda s, r: evaluate.report([]), SpecError, "there is no directory"),
        (lambda s, r: evaluate.report(r, out=r), SpecError, "is a directory"),
        (lambda s, r: evaluate.load_models(r, dtype="int4", quiet=True), SpecError, "dtype 'int4'"),
        (lambda s, r: evaluate.stitch(None, r), SpecError, "store None: give a path, not NoneType"),
        (lambda s, r: evaluate.stitch(s, r, layers=2.5), SpecError, "layers 2.5: write numbers"),
        (lambda s, r: evaluate.stitch(s, r, layers=[]), SpecError, "layers []: write numbers"),
        (lambda s, r: evaluate.stitch(s, r, out=3), SpecError, "out 3: give a path, not int"),
        (lambda s, r: evaluate.stitch(s, r, models=[object]), SpecError, "a list has NAME=REF"),
        (lambda s, r: evaluate.generate(r, 3), SpecError, "prompts 3: give text"),
        (lambda s, r: evaluate.generate(r, "a", sample=True, temperature="x"), SpecError, "temperature='x'"),
        (lambda s, r: evaluate.communicate(r, None), SpecError, "task None: give the name of a task"),
        (lambda s, r: evaluate.communicate(r, [3]), SpecError, "task=3: expected str"),
        (lambda s, r: evaluate.communicate(r, examples=1.5), SpecError, "examples=1.5: expected int"),
        (lambda s, r: evaluate.communicate(r, summary_tokens="x"), SpecError, "summary_tokens='x': expected int"),
        (lambda s, r: evaluate.communicate(r, max_new_tokens=None), SpecError, "max_new_tokens=None: expected int"),
        (lambda s, r: evaluate.report(None), SpecError, "dirs None: give run directories"),
        (lambda s, r: evaluate.report(r, out=3), SpecError, "out 3: give a path, not int"),
        (lambda s, r: evaluate.StitchResult.read(None), SpecError, "where None: give a path, not NoneType"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line(
    run: Path, tiny_store: Path, call_it: Any, kind: type[Exception], message: str
) -> None:
    before = sorted(run.iterdir())
    with pytest.raises(kind) as caught:
        call_it(tiny_store, run)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(run.iterdir()) == before


def test_numbers_of_numpy_are_numbers(run: Path, tiny_store: Path, models: dict[str, Loaded]) -> None:
    options: dict[str, Any] = {"max_tokens": 60, "models": models, "write": False, "quiet": True}
    plain = evaluate.stitch(tiny_store, run, layers=2, seed=3, **options)
    assert evaluate.stitch(tiny_store, run, layers=np.int64(2), seed=np.int64(3), **options).pairs == plain.pairs


def test_a_run_that_takes_no_results_is_refused_before_they_are_computed(
    run: Path, tiny_store: Path, models: dict[str, Loaded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != run and access(path, mode))
    for call_it in (
        lambda **more: evaluate.stitch(tiny_store, run, max_tokens=60, quiet=True, **more),
        lambda **more: evaluate.generate(run, "a", max_new_tokens=1, quiet=True, **more),
        lambda **more: evaluate.communicate(run, "lookup:2", examples=1, max_new_tokens=1, quiet=True, **more),
    ):
        # No model can be loaded from there: it is refused before.
        with pytest.raises(SpecError, match=f"^--out {run}: no permission to write in {run}; choose another"):
            call_it(models={"llama": "nowhere", "mistral": "nowhere"})
        assert call_it(models=models, out=tmp_path).path is not None
        assert call_it(models=models, write=False).path is None


def test_half_of_a_surrogate_pair_is_no_prompt(run: Path, models: dict[str, Loaded]) -> None:
    with pytest.raises(SpecError, match="holds half of a surrogate pair"):
        evaluate.generate(run, "a \ud800", models=models, write=False, quiet=True)


# Models that are loaded already.


def test_a_model_of_ones_own_is_checked_as_one_that_is_loaded(run: Path, models: dict[str, Loaded]) -> None:
    adapter = load_adapter(run)
    mine = adopt(adapter, "mistral", models["mistral"].model)
    assert mine.model is models["mistral"].model
    assert (mine.median_norm, mine.sink_threshold) == (models["mistral"].median_norm, models["mistral"].sink_threshold)
    assert mine.info.tokenizer_hash == models["mistral"].info.tokenizer_hash
    assert repr(mine).startswith("Loaded('mistral', mistral, 4 blocks of width 32, float32 on cpu")
    with pytest.raises(AdapterError, match=r"model 'llama' .* has depth 4, the run was fitted to 3"):
        adopt(adapter, "llama", models["mistral"].model)
    with pytest.raises(AdapterError, match=r"model 'llama' .* has configuration"):
        adopt(adapter, "llama", models["mistral"])


def test_a_fine_tune_of_ones_own_is_refused(run: Path, models: dict[str, Loaded]) -> None:
    tuned = deepcopy(models["mistral"].model)
    with torch.no_grad():
        tuned.model.layers[0].mlp.down_proj.weight += 0.1
    with pytest.raises(AdapterError, match=r"model 'mistral' .* has weights"):
        evaluate.load_models(run, models={"mistral": tuned}, quiet=True)


# A loop of one's own.


def stitched_logits(
    model: Any, adapter: Adapter, window: Window, store: Store, keep: str = "own"
) -> tuple[torch.Tensor, Any]:
    """Logits as `evaluate stitch` has them, and the states it puts in."""
    to = wire(adapter, adapter.aligners[KEY])
    rows = store.rows("llama", 2)[window.source_row : window.source_row + len(window.source.ids)]
    mapped, stream = to.states(np.asarray(rows), window), residual_stream(model)
    own = sites.capture(stream, ids_of(window), [2])[2]
    with (
        torch.inference_mode(),
        inject(stream, aligned(own, [mapped], [window.places], layer=2, keep=keep), whole=True),
    ):
        return model(input_ids=ids_of(window), use_cache=False).logits, mapped


@pytest.mark.parametrize("keep", ["own", "hide"])
def test_injected_logits_are_those_of_stitch_to_the_bit(
    run: Path, models: dict[str, Loaded], store: Store, window: Window, keep: str
) -> None:
    target = models["mistral"].model
    wanted, mapped = stitched_logits(target, load_adapter(run), window, store, keep)
    rows = source_rows(store, window)
    ways: list[dict[str, Any]] = [
        {"states": rows, "positions": window.places},
        {"states": torch.from_numpy(rows), "positions": window.places.tolist()},
        {"states": [rows], "positions": [window.places]},
        {"states": torch.from_numpy(rows)[None], "positions": torch.from_numpy(window.places)[None]},
        {"mapped": mapped, "positions": tuple(window.places)},
    ]
    for way in ways:
        for model in (target, models["mistral"]):
            with torch.no_grad(), evaluate.inject(model, run, key=KEY, keep=keep, **way) as injection:
                assert torch.equal(target(ids_of(window)).logits, wanted)
            assert (injection.key, injection.layer, injection.passes) == (KEY, 2, 1)
            assert torch.equal(injection.states[0], torch.from_numpy(mapped))
            assert injection.positions[0].tolist() == window.places.tolist()
    with torch.no_grad():
        assert not torch.equal(target(ids_of(window)).logits, wanted)


def test_ones_own_states_change_no_bit(run: Path, models: dict[str, Loaded], window: Window) -> None:
    target, ids = models["mistral"].model, ids_of(window)
    own = sites.capture(models["mistral"].stream, ids, [2])[2]
    with torch.no_grad():
        clean = target(ids).logits
        with evaluate.inject(target, run, key=KEY, mapped=own[0], positions=range(ids.shape[1])):
            assert torch.equal(target(ids).logits, clean)
        assert torch.equal(target(ids).logits, clean)


def test_a_batch_has_states_and_positions_for_each_prompt(run: Path, models: dict[str, Loaded], store: Store) -> None:
    target = models["mistral"].model
    ids = torch.randint(5, 1000, (2, 9), generator=torch.Generator().manual_seed(0))
    rows = [store.rows("llama", 2)[5:7], store.rows("llama", 2)[20:23]]
    places = [[3, 8], [0, 1, -1]]
    with torch.no_grad():
        with evaluate.inject(target, run, key=KEY, states=rows, positions=places):
            both = target(ids).logits
        for row in range(2):
            with evaluate.inject(target, run, key=KEY, states=rows[row], positions=places[row]):
                torch.testing.assert_close(target(ids[row : row + 1]).logits[0], both[row], rtol=1e-3, atol=1e-3)
            assert (target(ids[row : row + 1]).logits[0] - both[row]).abs().max() > 0.1


@pytest.mark.parametrize("texts", [PROMPTS[0], PROMPTS])
def test_a_text_goes_on_as_generate_has_it(run: Path, models: dict[str, Loaded], texts: str | list[str]) -> None:
    wanted = evaluate.generate(run, texts, max_new_tokens=5, models=models, quiet=True, write=False).entries
    for key, role in ((KEY, "source_to_target"), (BACK, "target_to_source")):
        source, target = (models[side.partition(":")[0]] for side in key.split("->"))
        with evaluate.inject(target.model, run, key=key, text=texts, source=source.model) as injection:
            ids, mask = injection.inputs["input_ids"], injection.inputs.get("attention_mask")
            mask = torch.ones_like(ids) if mask is None else mask
            options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
            found = target.model.generate(ids, attention_mask=mask, **options)
            assert injection.passes == 1
            with torch.no_grad():
                first = target.model(**injection.inputs).logits[:, -1].argmax(dim=-1)
        assert found[:, ids.shape[1]].tolist() == first.tolist()
        said = target.info.tokenizer.batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True)
        assert said == [getattr(entry, role)[key]["mapped"] for entry in wanted]


def test_a_map_of_windows_takes_text(compressed: Path, models: dict[str, Loaded], store: Store) -> None:
    wanted = evaluate.generate(compressed, PROMPTS, max_new_tokens=3, models=models, quiet=True, write=False).entries
    target = models["mistral"]
    with evaluate.inject(target, compressed, text=PROMPTS, source=models["llama"]) as injection:
        ids, mask = injection.inputs["input_ids"], injection.inputs["attention_mask"]
        found = target.model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
    said = target.info.tokenizer.batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True)
    assert said == [entry.source_to_target[KEY]["mapped"] for entry in wanted]
    with pytest.raises(AdapterError, match=r"is a compress map: .*; give text= and source= instead of states="):
        evaluate.inject(target, compressed, states=store.rows("llama", 2)[:1], positions=[0])


ROW = np.zeros((1, 48), np.float32)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({}, SpecError, r"inject\(\) got nothing to inject; give states= and positions="),
        ({"states": ROW}, SpecError, r"inject\(\) got states; give"),
        ({"states": ROW, "mapped": ROW, "positions": [0]}, SpecError, r"inject\(\) got mapped, states, positions"),
        ({"text": "a", "positions": [0]}, SpecError, r"inject\(\) got text, positions"),
        ({"states": ROW, "positions": [0], "source": 1}, SpecError, r"inject\(\) got states, positions, source"),
        ({"text": "a"}, SpecError, "text= needs source=: the model 'llama'"),
        ({"text": [], "source": 1}, SpecError, "there is no text to inject"),
        ({"states": ROW, "positions": [0], "key": None}, SpecError, f"this run has 2 maps; choose one .*{KEY}, {BACK}"),
        ({"states": ROW, "positions": [0], "key": "a:1->b:1"}, SpecError, f"key 'a:1->b:1': this run has {KEY}"),
        ({"states": ROW[:, :5], "positions": [0]}, AdapterError, f"{KEY} takes states of width 48, not 5"),
        ({"mapped": ROW, "positions": [0]}, SpecError, "states of width 48 for a model of width 32"),
        ({"states": ROW, "positions": [0, 1]}, SpecError, r"prompt 0: states of shape \(1, 32\) for 2 positions"),
        ({"states": [ROW], "positions": [[0], [1]]}, SpecError, "states for 1 prompts and positions for 2"),
        ({"states": ROW, "positions": [0.5]}, SpecError, r"positions \[0.5\]: give whole numbers"),
        ({"states": ROW, "positions": [[0], 1]}, SpecError, r"positions \[\[0\], 1\]: give whole numbers"),
        ({"states": ROW.astype(int), "positions": [0]}, SpecError, "int64: give floating point"),
        ({"states": ROW[0], "positions": [0]}, SpecError, r"states of shape \(48,\)"),
        ({"states": "abc", "positions": [0]}, SpecError, "states 'abc': give floating point"),
        ({"states": [None], "positions": [[0]]}, SpecError, "states None: give floating point"),
        ({"states": ROW, "positions": [2**70]}, SpecError, "positions .*: give whole numbers"),
        ({"states": ROW, "positions": 0.5}, SpecError, "positions 0.5: give whole numbers"),
        ({"text": 3, "source": 1}, SpecError, "text 3: give a text, or one for each prompt"),
        ({"text": [3], "source": 1}, SpecError, "text=3: expected str"),
        ({"states": ROW, "positions": [0], "keep": "all"}, SpecError, "keep 'all': choose one of own, hide"),
        ({"states": ROW, "positions": [99]}, SpecError, "prompt 0: position 99 is outside its 4 tokens"),
    ],
)
def test_what_cannot_be_injected_is_refused_in_one_line(
    run: Path, models: dict[str, Loaded], options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    target = models["mistral"].model
    with pytest.raises(kind, match=message) as caught, evaluate.inject(target, run, **{"key": KEY, **options}):
        target(torch.ones(1, 4, dtype=torch.long))
    assert "\n" not in str(caught.value)


def test_a_model_without_the_layer_is_refused(run: Path, models: dict[str, Loaded]) -> None:
    short = deepcopy(models["mistral"].model)
    short.model.layers = short.model.layers[:1]
    short.config.num_hidden_layers = 1
    with pytest.raises(LayerRangeError, match=rf"{KEY} goes to layer 2, outside 0..1 of this model"):
        evaluate.inject(short, run, key=KEY, states=ROW, positions=[0])
