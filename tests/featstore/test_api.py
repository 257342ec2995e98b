"""The functions of the package: the command's work and its errors, from arguments."""

from __future__ import annotations

import dataclasses
import inspect
import json
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer

import featstore
import featstore.api
import featstore.cli
from featstore.api import layer_texts, model_texts
from featstore.errors import FeatstoreError, LayerRangeError, SpecError, StoreStateError
from featstore.extraction.settings import Settings
from tests.support.commands import call
from tests.support.store_fixtures import tree_bytes


@pytest.fixture
def place(tiny_llama, tiny_mistral, sample_texts, tmp_path, monkeypatch) -> Path:
    """A directory as in the examples: a model, some articles."""
    shutil.copytree(tiny_llama, tmp_path / "model")
    shutil.copytree(tiny_mistral, tmp_path / "other@1")
    (tmp_path / "articles").mkdir()
    for number, text in enumerate(sample_texts[:12]):
        (tmp_path / "articles" / f"{number:02d}.txt").write_text(text[:600], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestNames:
    def test_everything_public_is_there_and_listed(self):
        assert dir(featstore) == sorted(featstore.__all__)
        for name in featstore.__all__:
            assert getattr(featstore, name) is not None
        assert featstore.extract is featstore.api.extract
        assert featstore.errors.SpecError is SpecError
        with pytest.raises(AttributeError, match="no attribute 'extrakt'"):
            featstore.extrakt  # noqa: B018

    def test_no_module_has_the_name_of_a_function(self):
        modules = {module.name for module in pkgutil.iter_modules(featstore.__path__)}
        assert modules & set(featstore.__all__) == {"errors"}

    def test_importing_and_naming_it_is_quick(self):
        code = (
            "import sys, featstore; featstore.extract; dir(featstore)\n"
            "print(sorted({'torch', 'transformers', 'datasets', 'dask', 'pandas', 'typer'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"

    def test_the_help_names_the_defaults(self):
        shown = {
            each.name: each.show_default
            for each in typer.main.get_command(featstore.cli.app).commands["extract"].params
        }
        shown["attention"] = shown.pop("attn")
        shown_by_typer = {"store", "device", "moments", "moments_memory", "given"}
        unlimited = {"max_documents": "all", "max_document_bytes": "all", "max_tokens": "1M"}
        unlimited |= {"generate": "none", "generate_with": "every model", "device_map": "one device"}
        for field in dataclasses.fields(Settings):
            if field.name in shown_by_typer:
                continue
            if field.default is False:
                continue  # a flag is off until it is typed
            value = field.default
            value = unlimited.get(field.name, value)
            values = value if isinstance(value, tuple) else [value]
            texts = [f"{each:g}" if isinstance(each, float) else str(each) for each in values]
            words = " and ".join(texts)
            assert shown[field.name] in (words, f"{words}, or the store's"), field.name

    def test_the_arguments_are_the_flags_and_so_are_their_defaults(self):
        options = {
            option.opts[0].removeprefix("--").replace("-", "_"): option
            for option in typer.main.get_command(featstore.cli.app).commands["extract"].params
        }
        arguments = dict(inspect.signature(featstore.extract).parameters)
        arguments["model"] = arguments.pop("models")
        assert arguments.keys() - {"quiet"} == options.keys() - {"dry_run", "json"}
        for name in arguments.keys() - {"quiet", "store"}:
            assert arguments[name].default == options[name].default, name
        assert str(arguments["store"].default) == str(options["store"].default)


@pytest.mark.demo_pair
class TestExtract:
    def test_it_is_the_command(self, place, capsys):
        store = featstore.extract(
            models={"llama": "./model", "mistral": place / "other@1"},
            layers={"llama": [0, 2], "mistral": "0%,100%"},
            dataset="text:articles/*.txt",
            store="called.zarr",
            max_tokens="2k",
            window_bytes=256,
            shard_rows=1024,
            format="float16",
            device="cpu",
            seed=3,
            moments=True,
            quiet=True,
        )
        assert capsys.readouterr() == ("", "")
        assert isinstance(store, featstore.Store)
        words = "--model llama=./model --layers llama=0,2 --layers mistral=0%,100% --dataset text:articles/*.txt"
        words += " --store typed.zarr --max-tokens 2000 --window-bytes 256 --shard-rows 1024 --format float16"
        words += f" --device cpu --seed 3 --moments --model mistral={place / 'other@1'} --json"
        typed = call(capsys, "featstore", "extract", *words.split()).json
        assert typed["store"] == "typed.zarr"
        assert tree_bytes(place / "called.zarr") == tree_bytes(place / "typed.zarr")

    def test_again_adding_and_contradicting(self, place, capsys):
        models, dataset = ["m=./model"], "text:articles/*.txt"
        first = featstore.extract(models, [2], dataset, "s.zarr", shard_rows=np.int64(1024), device="cpu", quiet=True)
        before = tree_bytes(place / "s.zarr")
        again = featstore.extract(models, [2], dataset, "s.zarr", device="cpu")
        assert "s.zarr is already complete" in capsys.readouterr().err
        assert (again.fingerprint, tree_bytes(place / "s.zarr")) == (first.fingerprint, before)
        grown = featstore.extract(store="s.zarr", layers=3, device="cpu", quiet=True)
        assert grown.model("m").layers == (2, 3)
        np.testing.assert_array_equal(grown.rows("m", 2)[:], first.rows("m", 2)[:])
        with pytest.raises(StoreStateError, match="other settings"):
            featstore.extract(store="s.zarr", format="float32", layers=[1], device="cpu", quiet=True)

    def test_errors_are_those_of_the_command(self, place, capsys):
        base = {"models": ["m=./model"], "dataset": "text:articles/*.txt", "store": "s.zarr", "quiet": True}
        wrong = [
            ({"layers": [0, 99]}, LayerRangeError, "--layers 0,99"),
            ({"layers": [0], "dataset": "text:none/*.txt"}, FeatstoreError, "--layers 0 --dataset text:none/*.txt"),
            ({"layers": [0], "format": "int4"}, SpecError, "--layers 0 --format int4"),
            ({"layers": [0], "max_tokens": "few"}, SpecError, "--layers 0 --max-tokens few"),
            ({"layers": [0], "layer_0": "none"}, SpecError, "--layers 0 --layer-0 none"),
            ({"layers": {"x": [0]}}, SpecError, "--layers x=0"),
            ({"layers": [0], "models": {"m": "./nowhere"}}, FeatstoreError, "--layers 0 --model m=./nowhere"),
            ({"layers": [0], "models": ["m"]}, SpecError, "--layers 0 --model m"),
        ]
        for arguments, kind, words in wrong:
            with pytest.raises(kind) as caught:
                featstore.extract(**(base | arguments))
            line = "" if "--model" in words else " --model m=./model"
            line += "" if "--dataset" in words else " --dataset text:articles/*.txt"
            typed = call(capsys, "featstore", "extract", *f"{words}{line} --store s.zarr".split())
            assert typed.refusal == f"featstore: {' '.join(str(caught.value).split())}\n"
        assert not (place / "s.zarr").exists()


class TestArguments:
    @pytest.mark.parametrize(
        ("models", "expected"),
        [
            ({"a": "x/y@main", "b": Path("dir")}, ("a=x/y@main", "b=dir")),
            ({"a": Path("dir@2/m")}, ("a=./dir@2/m",)),
            ({"a": Path("/dir@2/m")}, ("a=/dir@2/m",)),
            (["a=x", "b=y"], ("a=x", "b=y")),
            ("a=x", ("a=x",)),
        ],
    )
    def test_models(self, models, expected):
        assert model_texts(models) == expected

    @pytest.mark.parametrize("models", [{}, [], {"a=b": "x"}, {"a": 3}, {3: "x"}, 7])
    def test_what_names_no_model(self, models):
        with pytest.raises(SpecError, match=r"^model"):
            model_texts(models)

    @pytest.mark.parametrize(
        ("layers", "expected"),
        [
            ([0, 8], ("0,8",)),
            (np.arange(3), ("0,1,2",)),
            (range(2), ("0,1",)),
            (8, ("8",)),
            ("0%,50%", ("0%,50%",)),
            (["0%", 3], ("0%,3",)),
            (["0,8", "llama=4"], ("0,8", "llama=4")),
            ({"a": [1, 2], "b": "50%", "c": 3}, ("a=1,2", "b=50%", "c=3")),
        ],
    )
    def test_layers(self, layers, expected):
        assert layer_texts(layers) == expected

    @pytest.mark.parametrize("layers", [[], {"a": []}, [1.5], 2.0, True, [None], [[1]], {"a": {"b": 1}}, b"0"])
    def test_what_names_no_layer(self, layers):
        with pytest.raises(SpecError, match=r"^layer"):
            layer_texts(layers)


class TestShown:
    def test_a_store_in_a_notebook(self, tiny_store):
        store = featstore.open_store(tiny_store)
        llama, mistral = (store.model(name) for name in store.models)
        assert repr(store) == (
            f"<Store {tiny_store}: llama 3 layers of {llama.rows} x 48, mistral 3 layers of {mistral.rows} x 32>"
        )
        table = store.to_pandas()
        assert isinstance(table, pd.DataFrame)
        assert table[["model", "layer"]].to_numpy().tolist() == [
            [m.name, layer] for m in (llama, mistral) for layer in m.layers
        ]
        assert table.loc[4].to_dict() == {
            "model": "mistral",
            "layer": 2,
            "depth": 4,
            "rows": mistral.rows,
            "width": 32,
            "states": "rows",
            "format": "bfloat16",
            "layout": "hot",
        }
        assert store._repr_html_().count("<tr>") == 7

    def test_what_is_written_in_a_store_is_no_markup(self, tiny_store, tmp_path):
        path = shutil.copytree(tiny_store, tmp_path / "a <b> store.zarr")
        assert "<b>" not in featstore.open_store(path)._repr_html_()

    def test_a_damaged_store_can_still_be_looked_at(self, tiny_store, tmp_path):
        path = Path(shutil.copytree(tiny_store, tmp_path / "s.zarr"))
        document = path / "models" / "llama" / "zarr.json"
        store = featstore.open_store(path, allow_incomplete=True)
        document.write_text(json.dumps({}))
        shown = repr(store)
        assert shown.startswith(f"<Store {path}: llama, mistral; {document} is not the document")


class TestWrong:
    @pytest.mark.parametrize("place", [None, 3, ["s.zarr"], b"s.zarr"])
    def test_what_is_no_place(self, place):
        with pytest.raises(SpecError, match=r"is no store: give the path or URL of one, not "):
            featstore.open_store(place)

    @pytest.mark.parametrize("layer", [2.0, "2", None, [2]])
    def test_what_is_no_layer(self, tiny_store, layer):
        store = featstore.open_store(tiny_store)
        store.rows("llama", 2)
        with pytest.raises(LayerRangeError) as caught:
            store.rows("llama", layer)
        assert str(caught.value) == f"layer {layer!r} of 'llama' is not in {tiny_store}; it holds 0, 2, 3"
        assert store.rows("llama", np.int64(2)) is store.rows("llama", 2)

    @pytest.mark.parametrize("split", [3, -1, "test"])
    def test_what_is_no_split(self, tiny_store, split):
        pairs = featstore.open_store(tiny_store).pairs("llama", "mistral")
        with pytest.raises(SpecError, match=r"split .*: give 0 for train, 1 for validation, 2 for test, or None"):
            pairs.select(split=split)

    def test_rows_of_a_store_of_moments(self, tiny_llama, tiny_mistral, short_corpus, tmp_path):
        models, corpus = {"llama": tiny_llama, "mistral": tiny_mistral}, f"jsonl:{short_corpus}"
        place = tmp_path / "moments.zarr"
        store = featstore.extract(models, [2], corpus, place, moments_only=True, device="cpu", quiet=True)
        with pytest.raises(StoreStateError, match="holds no rows of layer 2 of 'llama', only moments; extract again"):
            store.rows("llama", 2)
