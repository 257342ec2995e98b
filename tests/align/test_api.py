"""What `import align` offers, on planted stores: the same as the commands, with numpy and torch, and wrong input."""

from __future__ import annotations

import inspect
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pandas as pd
import pytest
import torch
import typer
from rich.console import Console

import align
import align.cli
from align.kernels.api import cka_matrix
from align.layers import LayerPair
from align.maps.fitted import Aligner, load_adapter, save_adapter
from align.metrics import debiased_cka
from align.results import read_metrics, read_similarity
from align.settings import LoopSettings, Settings
from align.sweeps.changes import changes, describe_changes
from align.sweeps.compare import compare_runs
from align.sweeps.table import describe
from featstore import open_store
from featstore.errors import (
    AdapterError,
    CorruptDataError,
    FeatstoreError,
    FitError,
    SpecError,
    StoreNotFoundError,
    UnknownMapError,
)
from featstore.runtime.console import jsonable
from tests.support.commands import call
from tests.support.planted import Planted, plant, rotation, spectrum_rows

KEY = "a:1->b:1"
WIDTHS = (6, 5)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """Two layers; targets are a rotation of the sources and noise."""
    rng = np.random.default_rng(1)
    x = {k: spectrum_rows(1200, WIDTHS[0], k, decay=0.3, mean=1.0) for k in (1, 2)}
    y = {k: x[k] @ rotation(*WIDTHS[:1], 7, WIDTHS[1]) + 0.2 * rng.normal(size=(1200, WIDTHS[1])) for k in (1, 2)}
    return plant(tmp_path_factory.mktemp("api") / "store.zarr", x, y)


@pytest.fixture(scope="module")
def runs(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> dict[str, align.Run]:
    """A closed form, a trained map, an mlp, a joint map; a compressed one of made-up tensors."""
    out = tmp_path_factory.mktemp("runs")
    trained: dict[str, Any] = {"layers": 1, "epochs": 2, "batch_size": 128, "tracker": "none", "device": "cpu"}
    made = {
        "affine": align.train(planted.path, "affine", both=True, out=out / "affine", quiet=True),
        "lora": align.train(planted.path, "lora", out=out / "lora", quiet=True, rank=2, **trained),
        "mlp": align.train(planted.path, "mlp", out=out / "mlp", quiet=True, hidden=8, **trained),
        "joint": align.train(planted.path, "affine", joint=True, out=out / "joint", quiet=True),
    }
    means = {"control_mean_source": np.zeros(6, np.float32), "control_mean": np.zeros(5, np.float32)}
    (out / "compress").mkdir()
    save_adapter(
        out / "compress", [Aligner(LayerPair("a", (1,), "b", 1), means, kind="compress")], {"type": "compress"}
    )
    return {**made, "compress": align.Run(out / "compress")}


def rich_text(value: Any) -> str:
    stream = io.StringIO()
    Console(file=stream, width=200).print(value)
    return stream.getvalue()


# The module ---------------------------------------------------------------------------------------------------------


def test_importing_align_imports_no_library_and_every_name_is_there() -> None:
    code = (
        "import sys, align; heavy = {'torch', 'sklearn', 'dask', 'matplotlib', 'pandas', 'numpy', 'pydantic'}; "
        "print(sorted(heavy & set(sys.modules)), sorted(align.__all__) == dir(align)); "
        "print([name for name in align.__all__ if getattr(align, name).__name__ != name])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["[] True", "[]"], done.stderr
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        align.trian  # noqa: B018


def test_a_name_stays_a_function_when_everything_is_imported() -> None:
    import align.closed_form.estimators
    import align.similarity.compare
    import align.sweeps.changes
    import align.sweeps.compare

    assert all(inspect.isfunction(getattr(align, name)) for name in ("train", "load", "cka", "compare", "changes"))


def defaults(function: Any) -> dict[str, Any]:
    return {name: each.default for name, each in inspect.signature(function).parameters.items()}


@pytest.mark.parametrize("name", ["train", "cka"])
def test_options_and_defaults_are_those_of_the_command(name: str) -> None:
    group = typer.main.get_command(align.cli.app)
    command = {each.name.rstrip("_"): each.default for each in group.commands[name].params}  # type: ignore[attr-defined]
    for own in ("help", "as_json", "config", "store"):
        command.pop(own, None)
    if name == "train":
        given = defaults(align.train)
    else:
        from align.api import _cka_of_store

        given = defaults(_cka_of_store)
        assert command.pop("out") is not None, "a notebook writes nothing unless it is told where"
        assert given.pop("out") is None
    assert given.pop("quiet") is False
    assert given.pop("store") is inspect.Parameter.empty
    assert given == command


# train --------------------------------------------------------------------------------------------------------------


def test_a_run_is_that_of_the_command(
    planted: Planted, runs: dict[str, align.Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--store", planted.path, "--type", "affine", "--both", "--out", tmp_path / "run")
    assert call(capsys, "align", "train", *words).code == 0
    for file in ("metrics.json", "documents.json", "adapter.safetensors", "run.yaml"):
        assert (tmp_path / "run" / file).read_bytes() == (runs["affine"].path / file).read_bytes()


@pytest.mark.parametrize("layers", [[2], (np.int64(2),), 2, "2", "25%", ["2"], range(2, 3)])
def test_layers_as_one_writes_them(planted: Planted, tmp_path: Path, layers: Any) -> None:
    run = align.train(planted.store, layers=layers, out=tmp_path / "run", quiet=True)
    assert list(run.metrics.pairs) == ["a:2->b:2"]
    assert run.settings == Settings(str(planted.path), layers="25%" if layers == "25%" else "2")


def test_other_ways_to_give_options(planted: Planted, tmp_path: Path) -> None:
    run = align.train(
        str(planted.path),
        layer_map={1: 2, 2: 1},
        components=np.int32(3),
        memory="2MiB",
        seed=np.int64(3),
        scale=np.False_,
        roles=["text", "assistant"],
        out=str(tmp_path / "run"),
        quiet=True,
    )
    own = Settings(str(planted.path), layer_map="1:2,2:1", components="3", memory=2**21, scale=False,
                   roles="text,assistant", loop=LoopSettings(seed=3))  # fmt: skip
    assert run.settings == own
    assert align.train(planted.path, "reduced-rank", rank=2, lr=1, out=tmp_path / "rr", quiet=True).settings.loop == (
        LoopSettings(rank=2, lr=1.0, skip="none")
    )


def test_the_default_directory_is_that_of_the_command(
    planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = (align.train(planted.path, layers=1, quiet=True) for _ in range(2))
    assert (first.path, second.path) == (Path("runs/procrustes-a-b"), Path("runs/procrustes-a-b-2"))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"ranks": 3}, TypeError, "no option 'ranks'; did you mean 'rank'?"),
        ({"lerning_rate": 3}, TypeError, "no option 'lerning_rate'"),
        ({"loop": LoopSettings()}, TypeError, "no option 'loop'"),
        ({"rank": "8"}, SpecError, "rank='8': expected int"),
        ({"rank": True}, SpecError, "rank=True: expected int"),
        ({"rank": 2.0}, SpecError, "rank=2.0: expected int"),
        ({"rank": None}, SpecError, "rank=None: expected int"),
        ({"both": 1}, SpecError, "both=1: expected bool"),
        ({"rank": 0}, SpecError, "rank 0: must be at least 1"),
        ({"type": "affin"}, SpecError, "'affin': choose one of procrustes"),
        ({"type": None}, SpecError, "type=None"),
        ({"layers": 9}, SpecError, "layer 9"),
        ({"layers": []}, SpecError, "write numbers such as"),
        ({"layers": [True]}, SpecError, "write numbers such as"),
        ({"layers": 1.5}, SpecError, "layers 1.5"),
        ({"layers": {1.5}}, SpecError, "write numbers such as"),
        ({"memory": "much"}, SpecError, "amount of memory 'much'"),
        ({"device": "gpu"}, SpecError, "device 'gpu'"),
        ({"source": "c"}, FeatstoreError, "no model 'c'"),
        ({"joint": True, "shared": True}, SpecError, "give one of them"),
        ({"roles": "narrator"}, SpecError, "--roles 'narrator': choose among text"),
        ({"roles": []}, SpecError, "--roles '': choose among text"),
        ({"roles": 3}, SpecError, "--roles 3: choose among text"),
        ({"roles": "assistant"}, FeatstoreError, "they have text ("),
        ({"layers": b"2"}, SpecError, "layers b'2': write numbers"),
        ({"layers": {"a": [1]}}, SpecError, "layers {'a': [1]}: write numbers"),
        ({"source": np.zeros((300, 2))}, SpecError, "source=array("),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(
    planted: Planted, tmp_path: Path, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as caught:
        align.train(planted.path, out=tmp_path / "run", quiet=True, **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


NO_PLACES = [3, ["runs/a"], b"runs/a", np.ones(2)]


@pytest.mark.parametrize("given", [None, *NO_PLACES])
@pytest.mark.parametrize(
    ("call_it", "name"),
    [
        (align.train, "store"),
        (align.load, "run"),
        (align.Run, "run"),
        (lambda x: align.compare([x]), "run"),
        (align.Similarity.read, "where"),
    ],
)
def test_what_is_no_place_is_named(call_it: Any, name: str, given: Any) -> None:
    with pytest.raises(SpecError) as caught:
        call_it(given)
    assert str(caught.value) == f"{name} {given!r}: give a path, not {type(given).__name__}"


@pytest.mark.parametrize("given", NO_PLACES)
@pytest.mark.parametrize("call_it", [align.train, align.cka])
def test_results_go_to_a_place(planted: Planted, call_it: Any, given: Any) -> None:
    with pytest.raises(SpecError, match=r"^out .*: give a path, not "):
        call_it(planted.path, out=given)


@pytest.mark.parametrize("given", [None, 3, b"runs/a"])
def test_runs_to_compare_are_several(given: Any) -> None:
    with pytest.raises(SpecError, match=r"runs .*: give run directories, or runs"):
        align.compare(given)


def test_a_working_directory_that_takes_no_runs(
    planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(SpecError, match=f"^--out runs/affine-a-b: no permission to write in {tmp_path};"):
        align.train(planted.path, "affine", quiet=True)
    assert not any(tmp_path.iterdir())


def test_no_store_and_no_free_directory(planted: Planted, runs: dict[str, align.Run], tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError):
        align.train(tmp_path / "nothing.zarr", quiet=True)
    with pytest.raises(SpecError, match="already holds a run"):
        align.train(planted.path, out=runs["affine"].path, quiet=True)


def test_an_interrupted_run_is_resumed(planted: Planted, runs: dict[str, align.Run], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes((runs["lora"].path / "run.yaml").read_bytes())
    for options in ({"rank": 3}, {"both": True}, {"type": "affine"}):
        with pytest.raises(SpecError, match=f"leave out {next(iter(options))}"):
            align.train(planted.path, out=tmp_path, resume=True, quiet=True, **options)
    resumed = align.train(planted.path, out=tmp_path, resume=True, device="cpu", quiet=True)
    assert (tmp_path / "adapter.safetensors").read_bytes() == (runs["lora"].path / "adapter.safetensors").read_bytes()
    assert resumed.metrics == runs["lora"].metrics
    with pytest.raises(SpecError, match="nothing to resume"):
        align.train(planted.path, out=tmp_path, resume=True, quiet=True)
    with pytest.raises(SpecError, match="--resume needs --out"):
        align.train(planted.path, resume=True, quiet=True)


# Run ----------------------------------------------------------------------------------------------------------------


def test_a_run_is_read_from_its_directory(runs: dict[str, align.Run]) -> None:
    run = align.Run(str(runs["affine"].path))
    assert run.metrics == read_metrics(run.path)
    assert list(run.maps) == list(run.metrics.pairs)
    assert [epoch.epoch for epoch in run.epochs] == [0]
    assert [epoch.epoch for epoch in runs["lora"].epochs] == [0, 1, 2]
    table = run.to_pandas()
    chosen = table[(table.pair == KEY) & (table["split"] == "test") & (table["map"] == "affine")]
    assert chosen.r2.tolist() == [run.metrics.pairs[KEY].test.r2]


def test_a_run_shows_itself(runs: dict[str, align.Run]) -> None:
    run, test = runs["affine"], runs["affine"].metrics.pairs[KEY].test
    assert repr(run).startswith(f"<Run {str(run.path)!r}: affine, 4 maps, R2 0.")
    for text in (rich_text(run), run._repr_html_().replace("&gt;", ">")):
        assert f"{KEY}" in text
        assert f"{test.r2:.3f}" in text
        assert "best control" in text
    assert run._repr_html_().count("<tr>") == 5


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    run = align.Run(tmp_path / "<none>")
    assert "not finished" in repr(run)
    assert "&lt;none&gt;" in run._repr_html_()
    assert "not finished" in rich_text(run)
    for read in (lambda: run.metrics, lambda: run.maps, run.to_pandas, lambda: run.plot("scores")):
        with pytest.raises(AdapterError, match="align train"):
            read()
    for read in (lambda: run.epochs, run.plot):
        with pytest.raises(AdapterError, match=r"no run directory '.*<none>'; make one with `align train`"):
            read()
    with pytest.raises(SpecError, match=r"run\.yaml"):
        run.settings  # noqa: B018


def test_damage_of_settings_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("{a: [")
    with pytest.raises(SpecError, match=r"is not a run.yaml of this program") as caught:
        align.Run(tmp_path).settings  # noqa: B018
    assert "\n" not in str(caught.value)


def test_a_map_whose_key_is_no_text_is_damaged(runs: dict[str, align.Run], tmp_path: Path) -> None:
    place = shutil.copytree(runs["affine"].path, tmp_path / "run")
    card = json.loads((place / "adapter.json").read_text())
    card["pairs"][0]["key"] = 3
    (place / "adapter.json").write_text(json.dumps(card))
    with pytest.raises(AdapterError, match=r"adapter\.json: /pairs/0/key is 3, expected text; the run is damaged"):
        align.load(place)


def test_plots_of_runs(runs: dict[str, align.Run]) -> None:
    scores = runs["affine"].plot()
    assert isinstance(scores, matplotlib.figure.Figure)
    assert [axes.get_title() for axes in scores.axes] == list(runs["affine"].metrics.pairs)
    [*lines] = runs["affine"].plot("scores").axes[0].get_yticklabels()
    assert lines[0].get_text() == "affine"
    assert {"mean", "shuffled"} <= {line.get_text().split()[0] for line in lines}
    colours = [bars.lines[0].get_color() for bars in runs["affine"].plot("scores").axes[0].containers]
    assert colours == ["C0", *["C1"] * (len(colours) - 1)], "controls look otherwise than the map"
    [axes] = runs["lora"].plot().axes
    assert axes.lines[0].get_ydata().tolist() == [epoch.pairs[KEY].val_loss for epoch in runs["lora"].epochs]
    assert scores._repr_png_()[:8] == b"\x89PNG\r\n\x1a\n", "a notebook shows it without pyplot"
    with pytest.raises(SpecError, match="'pie': choose one of scores, curves"):
        runs["lora"].plot("pie")
    with pytest.raises(SpecError, match="not trained over epochs"):
        runs["affine"].plot("curves")


# load ---------------------------------------------------------------------------------------------------------------


def test_maps_are_a_mapping(runs: dict[str, align.Run]) -> None:
    maps = align.load(runs["affine"])
    assert len(maps) == 4
    assert set(maps) == {"a:1->b:1", "a:2->b:2", "b:1->a:1", "b:2->a:2"}
    assert KEY in maps
    assert "a:1->b:2" not in maps
    assert maps.get("nothing") is None
    assert (maps.type, maps.path) == ("affine", runs["affine"].path)
    assert (maps[KEY].key, maps[KEY].kind, maps[KEY].widths) == (KEY, "linear", WIDTHS)
    assert maps[KEY].options["lambda"] >= 0
    assert "a:1->b:1" in repr(maps)
    assert repr(maps[KEY]) == "<Map a:1->b:1: linear, 6 to 5 dimensions>"
    assert "a:1->b:1" in rich_text(maps)
    assert "<table>" in maps._repr_html_()
    table = maps.to_pandas()
    assert table.pair.tolist() == list(maps)
    assert table.source_width.tolist() == [6, 6, 5, 5]


def test_a_key_that_is_not_there(runs: dict[str, align.Run]) -> None:
    maps = align.load(runs["affine"].path)
    with pytest.raises(UnknownMapError) as caught:
        maps["a:1->b:3"]
    assert isinstance(caught.value, KeyError)
    assert str(caught.value).startswith("no map 'a:1->b:3' in ")
    assert "did you mean 'a:1->b:1'? It has 'a:1->b:1', " in str(caught.value)
    with pytest.raises(UnknownMapError, match=r"no map 0 in .*; it has 'a:1->b:1', "):
        maps[0]  # type: ignore[index]
    assert all(repr(key) in str(caught.value) for key in maps)
    with pytest.raises(UnknownMapError, match="no map 3"):
        maps[3]  # type: ignore[index]
    with pytest.raises(AdapterError, match=r"no maps in .*align train"):
        align.load("nowhere")


@pytest.mark.parametrize("name", ["affine", "lora", "mlp", "joint"])
def test_arrays_and_tensors_are_mapped_alike(runs: dict[str, align.Run], name: str) -> None:
    maps = align.load(runs[name])
    key = next(iter(maps))
    fitted, stored = maps[key], load_adapter(runs[name].path).aligners[key]
    x = np.random.default_rng(2).normal(size=(7, fitted.widths[0])).astype(np.float32)
    expected = stored.apply(x)
    mapped = fitted.transform(x)
    assert mapped.dtype == np.float32
    np.testing.assert_array_equal(mapped, expected)
    tensor = fitted.transform(torch.from_numpy(x))
    assert (tensor.dtype, tensor.device) == (torch.float32, torch.device("cpu"))
    # Another library's sums of six float32 products.
    np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3,), (2, 4), (2, 1, 3)])
def test_any_leading_shape(runs: dict[str, align.Run], shape: tuple[int, ...]) -> None:
    for name in ("affine", "mlp"):
        fitted = align.load(runs[name])[KEY]
        x = np.random.default_rng(3).normal(size=(*shape, 6)).astype(np.float32)
        expected = fitted.transform(x.reshape(-1, 6)).reshape(*shape, 5)
        np.testing.assert_allclose(fitted.transform(x), expected, atol=1e-6)
        assert fitted.transform(torch.from_numpy(x)).shape == (*shape, 5)


def test_other_element_types_are_mapped_in_float32(runs: dict[str, align.Run]) -> None:
    fitted = align.load(runs["affine"])[KEY]
    x = np.random.default_rng(4).integers(-3, 4, size=(5, 6))
    expected = fitted.transform(x.astype(np.float32))
    for kind in (np.float16, np.float64, np.int8, np.int64):
        assert fitted.transform(x.astype(kind)).dtype == np.float32
        np.testing.assert_array_equal(fitted.transform(x.astype(kind)), expected)
    np.testing.assert_array_equal(fitted.transform(x.tolist()), expected)
    for tensor_kind in (torch.float16, torch.bfloat16, torch.float64, torch.int64):
        mapped = fitted.transform(torch.tensor(x).to(tensor_kind))
        assert mapped.dtype == torch.float32
        np.testing.assert_allclose(mapped.numpy(), expected, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        np.testing.assert_allclose(fitted.transform(torch.tensor(x)).numpy(), expected, atol=1e-5)


def test_gradients_flow_to_the_states_alone(runs: dict[str, align.Run]) -> None:
    for name in ("affine", "mlp"):
        fitted = align.load(runs[name])[KEY]
        x = torch.ones(2, 6, requires_grad=True)
        fitted.transform(x).sum().backward()
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()
        assert (x.grad != 0).any()
    fitted = align.load(runs["affine"])[KEY]
    jacobian = torch.autograd.functional.jacobian(fitted.transform, torch.zeros(6))
    torch.testing.assert_close(jacobian.T, torch.from_numpy(fitted.weight))


def test_weight_and_bias_are_the_map(runs: dict[str, align.Run]) -> None:
    fitted = align.load(runs["affine"])[KEY]
    x = np.random.default_rng(5).normal(size=(4, 6)).astype(np.float32)
    assert (fitted.weight.shape, fitted.bias.shape) == ((6, 5), (5,))
    np.testing.assert_allclose(x @ fitted.weight + fitted.bias, fitted.transform(x), atol=1e-5)
    np.testing.assert_allclose(fitted.transform(fitted.mean_source), fitted.mean_target, atol=1e-5)
    for name in ("weight", "bias", "mean_source", "mean_target"):
        with pytest.raises(AdapterError, match="is a mlp map, which is no single matrix"):
            getattr(align.load(runs["mlp"])[KEY], name)


def test_a_joint_map_takes_its_layers_end_to_end(planted: Planted, runs: dict[str, align.Run]) -> None:
    fitted = align.load(runs["joint"])["a:1+2->b:1"]
    x = np.hstack([planted.x[1][:50], planted.x[2][:50]])
    error = ((fitted.transform(x) - planted.y[1][:50]) ** 2).mean()
    assert error < 0.1 * planted.y[1].var()
    with pytest.raises(AdapterError, match=r"width 12, not states of width 6; .* of a at layers 1, 2, end to end"):
        fitted.transform(planted.x[1][:50])


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_states_that_are_none_of_this_map(runs: dict[str, align.Run], kind: Any) -> None:
    fitted = align.load(runs["affine"])[KEY]
    for wrong, words in (
        (np.zeros((3, 5)), "takes states of width 6, not states of width 5; give the residual stream of a at layer 1"),
        (np.zeros(0), "width 0"),
        (np.zeros(()), "not a single number"),
        (np.zeros((3, 6), dtype=complex), "maps real numbers, not"),
        (np.zeros((3, 6), dtype=bool), "maps real numbers, not"),
    ):
        with pytest.raises(AdapterError) as caught:
            fitted.transform(kind(wrong))
        assert words in str(caught.value)
    for none in (np.array([["a"] * 6]), [[1.0], [1.0, 2.0]]):
        with pytest.raises(AdapterError, match="real numbers"):
            fitted.transform(none)
    for tensor in (torch.zeros(3, 6).to_sparse(), torch.zeros(3, 6, device="meta")):
        with pytest.raises(AdapterError, match="maps dense tensors with values"):
            fitted.transform(tensor)
    assert np.isnan(np.asarray(fitted.transform(kind(np.full((1, 6), np.nan))))).all()


def test_compressed_maps_read_windows(runs: dict[str, align.Run]) -> None:
    fitted = align.load(runs["compress"])[KEY]
    for x in (np.zeros((3, 6)), torch.zeros(3, 6)):
        with pytest.raises(AdapterError, match="is a compress map: it reads whole windows"):
            fitted.transform(x)
    with pytest.raises(AdapterError, match="no single matrix"):
        fitted.weight  # noqa: B018


# cka ----------------------------------------------------------------------------------------------------------------


def test_cka_of_a_store_is_that_of_the_command(
    planted: Planted, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # Nothing is at its default, and each option changes a figure.
    options: dict[str, Any] = {"draws": 20, "max_rows": 100, "seed": 3, "policy": "word", "estimator": "biased"}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    words += ["--store", planted.path, "--measures", "rsa", "--keep-sinks", "--out", "command"]
    assert call(capsys, "align", "cka", *words).code == 0
    options |= {"keep_sinks": True, "quiet": True}
    found = align.cka(planted.store, measures=["rsa"], **options)
    assert capsys.readouterr() == ("", "")
    assert (found.estimator, found.keep_sinks) == ("biased", True)
    assert found.sample is not None
    assert (found.sample.rows, found.sample.draws, found.sample.seed) == (100, 20, 3)
    assert found.n == len(planted.store.pairs("a", "b", "word")) != len(planted.store.pairs("a", "b", "end"))
    assert [path.name for path in tmp_path.iterdir()] == ["command"], "nothing is written unless it is told where"
    assert (found.path, found.files) == (None, [])
    saved = read_similarity(Path("command"))
    assert {**found.content(), "store": None} == {**saved.content(), "store": None}
    written = align.cka(str(planted.path), measures="rsa", out="own", **options)
    assert (written.path, written.files[:3]) == (Path("own"), ["cka.json", "cka_documents.json", "cka.html"])
    for name in ("cka.json", "cka.png"):
        assert Path("own", name).read_bytes() == Path("command", name).read_bytes()
    assert sorted(path.name for path in Path("own").iterdir()) == sorted(written.files)


def test_cka_of_chosen_models_and_layers(planted: Planted) -> None:
    found = align.cka(planted.path, models=("b", "a"), layers=[2], quiet=True)
    assert (found.models, dict(found.layers)) == (("b", "a"), {"b": (2,), "a": (2,)})
    same = align.cka(planted.path, models="b,a", layers="25%", quiet=True)
    assert same.cross == found.cross
    assert align.cka(planted.path, models=["a", "a"], quiet=True).models == ("a", "a")


def test_a_similarity_shows_itself(planted: Planted) -> None:
    found = align.cka(planted.path, measures="rsa", draws=20, quiet=True)
    value = found.cross[0][1]
    assert repr(found) == str(found)
    assert repr(found).startswith("<Similarity 2 layers of a x 2 of b: debiased linear CKA ")
    for text in (rich_text(found), found._repr_html_()):
        assert all(words in text for words in ("a:1", "b:2", f"{value:.3f}", "same token elsewhere"))
    table = found.to_pandas()
    assert table.cka.tolist() == [value for row in found.cross for value in row]
    assert "rsa" in table
    assert (table.cka_low < table.cka).all()
    assert (table.cka < table.cka_high).all()
    assert isinstance(found.plot(), matplotlib.figure.Figure)
    assert "RSA" in found.plot(measures=True).axes[0].get_title()
    with pytest.raises(SpecError, match="no other measures"):
        align.cka(planted.path, layers=1, quiet=True).plot(measures=True)


@pytest.mark.parametrize("estimator", ["debiased", "biased"])
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_cka_of_arrays(estimator: Any, kernel: Any) -> None:
    rng = np.random.default_rng(6)
    x = rng.normal(size=(300, 6))
    y = np.tanh(x @ rng.normal(size=(6, 4))) + 0.3 * rng.normal(size=(300, 4))
    value = align.cka(x, y, estimator=estimator, kernel=kernel)
    assert type(value) is float
    assert value == cka_matrix([x, y], estimator=estimator, kernel=kernel)[0, 1]
    assert align.cka(torch.from_numpy(x), torch.from_numpy(y), estimator=estimator, kernel=kernel) == value
    assert align.cka(x, torch.from_numpy(y), estimator=estimator, kernel=kernel) == value
    if (estimator, kernel) == ("debiased", "linear"):
        assert align.cka(x, y) == pytest.approx(debiased_cka(x, y)[0], abs=1e-9)
        labels = np.arange(len(x)) // 7
        by_document = debiased_cka(x, y, labels)[0]
        assert align.cka(x, torch.from_numpy(y), documents=torch.from_numpy(labels)) == pytest.approx(
            by_document, abs=1e-6
        )
        # Features with nothing in common have no self-HSIC over pairs of different ones.
        x, y = x + 2 * x[:, :1], y + 2 * y[:, :1]
        corrected, reason = debiased_cka(x, y, labels, correct_features=True)
        assert reason is None
        assert align.cka(torch.from_numpy(x), y, documents=labels, correct_features=True) == pytest.approx(
            corrected, abs=1e-9
        )
        with pytest.raises(SpecError, match="correct_features is of the estimator 'debiased'"):
            align.cka(x, y, kernel="rbf", correct_features=True)
        assert align.cka(x, x @ rotation(6, 2) * 3 + 1) == pytest.approx(1.0)
        assert abs(align.cka(x, rng.normal(size=(300, 6)))) < 0.05


def test_cka_that_is_undefined_says_why() -> None:
    x = np.random.default_rng(7).normal(size=(30, 3))
    with pytest.warns(RuntimeWarning, match=r"its rows do not differ \(the second array\)"):
        assert np.isnan(align.cka(x, np.ones((30, 2))))


@pytest.mark.parametrize(
    ("given", "options", "error", "words"),
    [
        (("x",), {}, TypeError, "two arrays of paired rows"),
        (("store", "x"), {}, TypeError, "one store, or two arrays"),
        (("x", "x"), {"layers": [1]}, TypeError, "documents, estimator, correct_features and kernel, not 'layers'"),
        (("x", "short"), {}, FitError, "30"),
        (("x", "nan"), {}, FitError, "finite"),
        (("x", "x"), {"kernel": "cubic"}, FitError, "cubic"),
        (("store",), {"layer": 1}, TypeError, "layer"),
        (("store",), {"estimator": "best"}, SpecError, "best"),
        (("store",), {"kernel": "cubic"}, SpecError, "--kernel 'cubic'"),
        (("store",), {"models": "a"}, SpecError, "write two names"),
        (("store",), {"models": ["a", "c"]}, FeatstoreError, "no model 'c'"),
        (("store",), {"layers": [9]}, SpecError, "layer 9"),
        (("store",), {"measures": ["best"]}, SpecError, "best"),
        (("store",), {"memory": 0}, SpecError, "amount of memory '0'"),
        (("store",), {"models": ""}, SpecError, "--models '': write two names"),
        (("store",), {"models": []}, SpecError, "--models []: write two names"),
        (("store",), {"models": 5}, SpecError, "models 5: give two names"),
        (("store",), {"models": [1, 2]}, SpecError, "--models [1, 2]: write two names"),
        (("store",), {"measures": 3}, SpecError, "measures 3: give names such as"),
        (("store",), {"measures": [3]}, SpecError, "measures=3: expected str"),
        (("store",), {"max_rows": "9", "kernel": "rbf"}, SpecError, "max_rows='9': expected int"),
        (("store",), {"draws": 1.5, "measures": "rsa"}, SpecError, "draws=1.5: expected int"),
        (("store",), {"workers": "2"}, SpecError, "workers='2': expected int | None"),
        (("store",), {"scheduler": 3}, SpecError, "scheduler=3: expected str | None"),
        (("store",), {"keep_sinks": "yes"}, SpecError, "keep_sinks='yes': expected bool"),
        (("store",), {"seed": -1}, SpecError, "seed -1: give a whole number, 0 or more"),
        (("store",), {"layer": [1]}, TypeError, "align.cka() has no option 'layer'; did you mean 'layers'?"),
        (("x", "words"), {}, FitError, "a layer is no array of numbers"),
        (("ragged", "x"), {}, FitError, "a layer is no array of numbers"),
        (("x", "sparse"), {}, FitError, "give dense rows"),
        (("nowhere",), {}, StoreNotFoundError, "nowhere"),
    ],
)
def test_cka_of_wrong_input(
    planted: Planted, given: tuple[str, ...], options: dict[str, Any], error: type[Exception], words: str
) -> None:
    x = np.random.default_rng(8).normal(size=(30, 3))
    known: dict[str, Any] = {"x": x, "short": x[:20], "nan": x * np.nan, "store": planted.path, "nowhere": "nowhere"}
    known |= {"words": x.astype(str), "ragged": [[1], [1, 2]], "sparse": torch.from_numpy(x).to_sparse()}
    with pytest.raises(error) as caught:
        align.cka(*(known[name] for name in given), **options)
    assert words in str(caught.value)


def test_no_measures_are_none(planted: Planted) -> None:
    assert not align.cka(planted.path, layers=1, measures=[], quiet=True).measures


def test_a_similarity_is_read_from_its_directory(planted: Planted, tmp_path: Path) -> None:
    found = align.cka(planted.path, layers=1, out=tmp_path / "cka", quiet=True)
    for place in (tmp_path / "cka", str(tmp_path / "cka" / "cka.json")):
        again = align.Similarity.read(place)
        assert again.content() == found.content()
        assert (again.path, again.files) == (found.path, found.files)
    assert repr(again).startswith("<Similarity 1 layer of a x 1 of b: debiased linear CKA ")
    good = json.loads((tmp_path / "cka" / "cka.json").read_text())
    for spoil, words in (
        ({"models": []}, "/models is a list of 0, expected one of one model or two"),
        ({"layers": {"a": [1]}}, "/layers has no 'b', expected the layers of 'a' and 'b'"),
        ({"layers": {"a": [1, 2], "b": [1]}}, "/cross is a matrix of another shape, expected 2 x 1 by the layers"),
        ({"within": {"a": [[1.0, 1.0]], "b": [[1.0]]}}, "/within/a is a matrix of another shape, expected 1 x 1"),
        ({"null": {**good["null"], "cross": [[0.1], [0.1]]}}, "/null/cross is a matrix of another shape"),
    ):
        (tmp_path / "cka" / "cka.json").write_text(json.dumps({**good, **spoil}))
        with pytest.raises(CorruptDataError, match=f"cka.json: .*{words}"):
            align.Similarity.read(tmp_path / "cka")
    with pytest.raises(AdapterError, match=r"no cka.json in .*`align cka`"):
        align.Similarity.read(tmp_path)


# compare ------------------------------------------------------------------------------------------------------------


def test_a_leaderboard_is_that_of_the_command(runs: dict[str, align.Run], capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [runs["affine"], str(runs["lora"].path), runs["joint"].path]
    board = align.compare(chosen)
    expected = compare_runs([Path(run) for run in chosen])
    assert board.content() == jsonable(expected)
    assert str(board) == describe(expected)
    assert call(capsys, "align", "compare", *map(Path, chosen), "--json").json == board.content()
    assert call(capsys, "align", "compare", *map(Path, chosen)).out.split() == str(board).split()
    assert len(align.compare(runs["affine"]).rows) == 4


def test_a_leaderboard_shows_itself(runs: dict[str, align.Run]) -> None:
    board = align.compare([runs["affine"], runs["lora"]])
    [best, second] = [row for row in board.rows if row.pair == KEY]
    affine, lora = sorted((best, second), key=lambda row: row.type)
    assert affine.versus_reference is None
    assert lora.versus_reference is not None
    assert (best.val_r2 or 0.0) >= (second.val_r2 or 0.0)
    assert board.chosen[0].run == best.run
    named = align.compare([runs["affine"], runs["lora"]], reference=runs["lora"])
    assert named.reference.run == str(runs["lora"].path)
    assert {row.type for row in named.rows if row.pair == KEY and row.versus_reference} == {"affine"}
    assert align.compare(runs["affine"], reference="identity").reference.baseline == "identity"
    with pytest.raises(SpecError, match="--reference 'nothing' is neither"):
        align.compare(runs["affine"], reference="nothing")
    table = board.to_pandas()
    assert len(table) == len(board.rows) == 5
    assert table[table.pair == KEY].r2.tolist() == [best.r2, second.r2]
    assert {"run", "type", "r2", "val_r2", "baseline_mean", "versus_reference_verdict"} <= set(table.columns)
    assert isinstance(table, pd.DataFrame)
    for text in (rich_text(board), board._repr_html_().replace("&gt;", ">")):
        assert all(words in text for words in (KEY, "affine", "lora", f"{best.r2:.3f}", "minus reference", "val R2"))
    assert f"2 runs, 4 layer pairs, reference {str(runs['affine'].path)!r}: " in repr(board)
    figure = board.plot()
    assert [axes.get_title() for axes in figure.axes] == ["a:1->b:1", "a:2->b:2", "b:1->a:1", "b:2->a:2"]
    assert [line.get_text() for line in figure.axes[0].get_yticklabels()] == [Path(r.run).name for r in (best, second)]
    with pytest.raises(SpecError, match="'pie': choose one of scores, rate"):
        board.plot("pie")
    with pytest.raises(SpecError, match="no run is of type compress"):
        board.plot("rate")


def test_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no runs to compare"):
        align.compare([])
    with pytest.raises(AdapterError, match="no finished run"):
        align.compare(tmp_path)


def test_changes_are_those_of_the_command(runs: dict[str, align.Run], capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [runs["affine"], runs["lora"]]
    found = align.changes(*chosen)
    expected = changes(*(run.path for run in chosen))
    assert found.content() == jsonable(expected)
    assert str(found) == describe_changes(expected)
    paths = [run.path for run in chosen]
    assert call(capsys, "align", "compare", *paths, "--changes", "--json").json == found.content()
    assert call(capsys, "align", "compare", *paths, "--changes").out.split() == str(found).split()
    assert align.changes(str(paths[0]), paths[1]) == found


def test_changes_show_themselves(runs: dict[str, align.Run]) -> None:
    found = align.changes(runs["affine"], runs["lora"])
    [change] = found.both
    assert (change.pair, change.types) == (KEY, ("affine", "lora"))
    assert [row.pair for row in found.only_first] == ["a:2->b:2", "b:1->a:1", "b:2->a:2"]
    assert found.only_second == ()
    assert change.difference == change.r2[1] - change.r2[0]  # type: ignore[operator]
    [row] = found.to_pandas().to_dict("records")
    assert (row["pair"], row["type_first"], row["type_second"]) == (KEY, "affine", "lora")
    assert (row["r2_first"], row["r2_second"]) == change.r2
    assert (row["difference"], row["reason"]) == (change.difference, change.reason)
    assert (row["val_r2_first"], row["baseline_mean_second"]) == (
        change.figures["val_r2"][0],
        change.baselines["mean"][1],
    )
    for text in (rich_text(found), found._repr_html_().replace("&gt;", ">")):
        words = (KEY, "affine, R2", "lora, R2", f"{change.difference:+.3f}", change.verdict, "only in affine: a:2->b:2")
        assert [word for word in words if word not in text] == []
    assert repr(found).endswith(f"lora': 1 layer pair in both, 1 {change.verdict}>")
    figure = found.plot()
    assert [axes.get_title() for axes in figure.axes] == ["lora minus affine"]
    assert [line.get_text() for line in figure.axes[0].get_yticklabels()] == [KEY]
    [bar] = figure.axes[0].containers
    assert bar.lines[0].get_xdata().tolist() == [change.difference]


def test_changes_are_of_two_finished_runs(runs: dict[str, align.Run], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no finished run"):
        align.changes(runs["affine"], tmp_path)
    with pytest.raises(SpecError, match="second"):
        align.changes(runs["affine"], 3)  # type: ignore[arg-type]


def test_an_open_store_serves_as_well_as_its_path(planted: Planted) -> None:
    assert align.cka(open_store(planted.path), layers=1, quiet=True).cross == (
        align.cka(planted.path, layers=1, quiet=True).cross
    )
