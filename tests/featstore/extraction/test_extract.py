"""The whole extraction: right rows in the right order, and the same bytes however often it was stopped."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from featstore import open_store
from featstore.errors import (
    FeatstoreError,
    LayerRangeError,
    ModelLoadError,
    NonFiniteStateError,
    NoSpaceError,
    SpecError,
    StoreFormatError,
    StoreStateError,
)
from featstore.extraction.estimate import dry_run
from featstore.extraction.job import Job, prepare
from featstore.extraction.run import extract
from featstore.extraction.settings import Settings
from featstore.models.loading import inspect_model, weight_bytes
from featstore.models.references import ModelSpec
from featstore.store.inspect.verify import verify_store
from featstore.text.windows import windows
from tests.support.commands import call, command_environment, command_line
from tests.support.store_fixtures import tree_bytes
from tests.support.tiny_models import save_with_tokenizer

LAYERS = {"llama": (0, 2, 3), "mistral": (0, 2, 4)}


@pytest.fixture(scope="module")
def settings(tiny_llama, tiny_mistral, short_corpus, tmp_path_factory) -> Settings:
    """An extraction of a second or two: two models, three layers each, seven shards each."""
    return Settings(
        model=(f"llama={tiny_llama}", f"mistral={tiny_mistral}"),
        layers=tuple(f"{name}={','.join(map(str, layers))}" for name, layers in LAYERS.items()),
        dataset=f"jsonl:{short_corpus}",
        store=tmp_path_factory.mktemp("extract") / "none.zarr",
        max_tokens=None,
        window_bytes=512,
        batch_tokens=1024,
        shard_rows=1024,
        layout="archive",
        form="float32",
        device="cpu",
    )


def arguments(settings: Settings) -> list[str]:
    """The same as a command line."""
    words = ["extract", "--max-tokens", "all"]
    for flag, values in (("--model", settings.model), ("--layers", settings.layers)):
        for value in values:
            words += [flag, value]
    for name in ("dataset", "store", "window_bytes", "batch_tokens", "shard_rows", "layout", "device"):
        words += [f"--{name.replace('_', '-')}", str(getattr(settings, name))]
    return [*words, "--format", settings.form]


def run(settings: Settings) -> Path:
    extract(prepare(settings, quiet=True), quiet=True)
    return settings.store


def at(settings: Settings, store: Path, **changes) -> Settings:
    return dataclasses.replace(settings, store=store, **changes)


@pytest.fixture(scope="module")
def undisturbed(settings, tmp_path_factory) -> Path:
    return run(at(settings, tmp_path_factory.mktemp("undisturbed") / "store.zarr"))


@pytest.fixture(scope="module")
def job(settings) -> Job:
    return prepare(settings, quiet=True)


# What is stored -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_rows_are_those_of_a_forward_pass_of_one_window_at_a_time(undisturbed, short_corpus, settings, name):
    """Tokens and states straight from transformers, without any code of ours."""
    directory = dict(text.split("=") for text in settings.model)[name]
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    store, table = open_store(undisturbed), open_store(undisturbed).tokens(name)
    last_output: list[torch.Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda _, __, output: last_output.append(output))
    texts = [json.loads(line)["text"].encode() for line in short_corpus.read_text(encoding="utf-8").splitlines()]
    cut = [(text, start, end) for text in texts for start, end in windows(text, settings.window_bytes)]
    assert len(cut) == len(store.corpus.window_document) > 50
    row, stored = 0, {layer: store.rows(name, layer)[:] for layer in LAYERS[name]}
    for number, (text, start, end) in enumerate(cut):
        window = text[start:end].decode()
        assert store.corpus.window_text(number) == window
        ids = tokenizer(window, return_tensors="pt").input_ids
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states
        rows = slice(row, row + ids.shape[1])
        np.testing.assert_array_equal(table.id[rows], ids[0].numpy())
        assert (table.window[rows] == number).all()
        for layer in LAYERS[name]:
            expected = last_output[-1] if layer == model.config.num_hidden_layers else states[layer]
            # Entries near zero carry the rounding of the whole row.
            rounding = 1e-6 * float(expected[0].norm(dim=1).median())
            np.testing.assert_allclose(stored[layer][rows], expected[0].numpy(), rtol=1e-5, atol=rounding)
        row += ids.shape[1]
    assert row == store.model(name).rows


def test_norms_medians_origins_and_sinks_follow_from_the_rows(undisturbed, tiny_llama):
    store = open_store(undisturbed)
    for name, layers in LAYERS.items():
        sinks = np.zeros(store.model(name).rows, bool)
        for layer in layers:
            rows = store.rows(name, layer)[:]
            np.testing.assert_allclose(store.norms(name, layer), np.linalg.norm(rows, axis=1), rtol=1e-6)
            median = store.median_norms(name)[str(layer)]
            # The pilot sees a quarter of so small a corpus.
            assert abs(median / np.median(store.norms(name, layer)) - 1) < 0.1
            sinks |= store.norms(name, layer) > 5 * median
            ordinary = rows[store.norms(name, layer) < 5 * median]
            assert np.linalg.norm(store.origin(name, layer) - ordinary.mean(axis=0)) < 0.2 * median
        if name == "llama":  # without a start token
            first = np.flatnonzero(np.diff(store.tokens(name).window, prepend=-1))
            assert not store.tokens(name).special[first].any()
            assert not sinks[first].all()
            sinks[first] = True
        np.testing.assert_array_equal(store.tokens(name).sink, sinks)
        assert 0 < sinks.sum() < len(sinks) / 20
    newline = AutoTokenizer.from_pretrained(tiny_llama)("\n", add_special_tokens=False)["input_ids"][0]
    assert store.tokens("llama").sink[store.tokens("llama").id == newline].all()
    assert store.tokens("mistral").sink[store.tokens("mistral").special].all()


def test_the_store_says_where_it_comes_from(undisturbed, settings, job):
    store = open_store(undisturbed)
    assert store.attributes["plan"] == job.plan.hash
    assert store.attributes["corpus"]["source"]["location"] == settings.dataset.removeprefix("jsonl:")
    assert store.attributes["split"]["documents"] == {"train": 24, "val": 4, "test": 2}
    for name, (depth, width) in {"llama": (3, 48), "mistral": (4, 32)}.items():
        model = store.model(name)
        assert (model.depth, model.width, model.layers) == (depth, width, LAYERS[name])
        expected = {"format": "float32", "layout": "archive", "compute_dtype": "float32", "attention": "sdpa"}
        assert expected.items() <= model.attributes.items()
        assert model.attributes["config_sha256"] == job.infos[name].config_hash
        assert {"torch", "transformers", "zarr"} <= model.attributes["versions"].keys()
    assert verify_store(undisturbed, quiet=True)["damage"] == []


def test_a_complete_store_is_left_alone(undisturbed, settings, capsys):
    before = tree_bytes(undisturbed)
    result = extract(prepare(at(settings, undisturbed), quiet=True))
    assert tree_bytes(undisturbed) == before
    assert "is already complete" in capsys.readouterr().err
    assert result["pairs"]["llama__mistral"]["pairs"] == len(open_store(undisturbed).pairs("llama", "mistral"))
    assert result["models"]["mistral"]["special"] == len(open_store(undisturbed).corpus.window_document)


# Stopped ------------------------------------------------------------------------------------------------------------


def stop_once_there(settings: Settings, unit: str, how: signal.Signals) -> subprocess.CompletedProcess[str]:
    """Start the command and send it a signal as soon as a unit has been committed."""
    process = subprocess.Popen(
        command_line("featstore", *arguments(settings)),
        env=command_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    entry = settings.store / "manifest" / f"{unit}.json"
    while process.poll() is None and not entry.exists():
        time.sleep(0.002)
    process.send_signal(how)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.thorough
def test_killed_three_times_and_run_again_the_command_writes_the_same_bytes(settings, undisturbed, run_cli, tmp_path):
    mine = at(settings, tmp_path / "store.zarr")
    for shard in ("llama/resid/0/rows-000001", "llama/resid/3/rows-000002", "mistral/resid/0/rows-000003"):
        unit = f"models/{shard}"
        stopped = stop_once_there(mine, unit, signal.SIGKILL)
        assert stopped.returncode == -signal.SIGKILL, stopped.stderr
        with pytest.raises(StoreStateError, match="unfinished"):
            open_store(mine.store)
        kept = {p.relative_to(mine.store): p.stat().st_mtime_ns for p in mine.store.rglob("rows-*.json")}
        assert Path(f"manifest/{unit}.json") in kept
    done = run_cli("featstore", *arguments(mine), "--json")
    assert done.returncode == 0, done.stderr
    assert tree_bytes(mine.store) == tree_bytes(undisturbed)
    for name, changed in kept.items():  # what was committed was not computed again
        assert (mine.store / name).stat().st_mtime_ns == changed
    result = json.loads(done.stdout)
    assert result["fingerprint"] == open_store(undisturbed).fingerprint
    assert result["models"]["llama"]["layers"] == [0, 2, 3]
    assert "loading llama" not in done.stderr
    assert "loading mistral" in done.stderr


@pytest.mark.thorough
def test_ctrl_c_exits_130_with_one_line_and_running_again_completes(settings, undisturbed, tmp_path):
    mine = at(settings, tmp_path / "store.zarr")
    stopped = stop_once_there(mine, "models/llama/resid/2/rows-000001", signal.SIGINT)
    assert stopped.returncode == 130, stopped.stderr
    assert stopped.stderr.strip().splitlines()[-1] == "featstore: interrupted; what was committed so far is kept"
    assert "Traceback" not in stopped.stderr
    assert stopped.stdout == ""
    assert (mine.store / "manifest/models/llama/resid/2/rows-000001.json").exists()
    assert tree_bytes(run(mine)) == tree_bytes(undisturbed)


def test_stopped_between_any_two_shards_it_ends_with_the_same_bytes(settings, undisturbed, tmp_path, monkeypatch):
    """In this process, so that every place can be tried: each attempt may commit two more units."""
    from featstore.store.write.writer import StoreWriter

    class StoppedError(Exception):
        pass

    commit, mine, attempts = StoreWriter.commit, at(settings, tmp_path / "store.zarr"), 0
    plan = prepare(mine, quiet=True)
    while True:
        left = 3

        def limited(self, unit, files, **facts):
            nonlocal left
            left -= 1
            if not left:
                raise StoppedError
            commit(self, unit, files, **facts)

        monkeypatch.setattr(StoreWriter, "commit", limited)
        try:
            extract(plan, quiet=True)
            break
        except StoppedError:
            attempts += 1
    assert attempts > 8
    assert tree_bytes(mine.store) == tree_bytes(undisturbed)


# Refused ------------------------------------------------------------------------------------------------------------


def spoiled(source: Path, into: Path, spoil) -> Path:
    """A copy of a model with something changed in its weights."""
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        spoil(model)
    return save_with_tokenizer(model, into, AutoTokenizer.from_pretrained(source))


class TestNotANumber:
    def test_the_command_names_model_and_layer_in_one_line(self, settings, tiny_llama, capsys, tmp_path):
        def spoil(model):
            model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")

        directory = spoiled(tiny_llama, tmp_path / "bad", spoil)
        mine = at(settings, tmp_path / "store.zarr", model=(f"bad={directory}",), layers=("0,1,2",))
        done = call(capsys, "featstore", *arguments(mine))
        assert done.code == 2
        assert done.out == ""
        (line,) = [x for x in done.err.splitlines() if not x.startswith("testing")]
        assert line.startswith("featstore: model 'bad', layer 2 holds NaN or infinity on ordinary tokens")
        assert "try --dtype float32, or check the model's weights" in line
        assert not mine.store.exists()

    def test_beyond_the_pilot_what_came_before_is_kept(self, settings, tiny_llama, tmp_path):
        texts = [f"document {i} has some plain words in it, and then some more of them " * 20 for i in range(8)]
        (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in [*texts, "a city"]))
        (city,) = AutoTokenizer.from_pretrained(tiny_llama)(" city")["input_ids"]

        def spoil(model):
            model.model.embed_tokens.weight[city, 5] = float("inf")

        directory = spoiled(tiny_llama, tmp_path / "bad", spoil)
        mine = at(
            settings,
            tmp_path / "store.zarr",
            model=(f"bad={directory}",),
            layers=("0,3",),
            dataset=f"jsonl:{tmp_path / 'texts.jsonl'}",
            shard_rows=256,
        )
        with pytest.raises(
            NonFiniteStateError, match=r"model 'bad', layer 0, row \d+ \(window \d+, document 8\) holds NaN"
        ):
            run(mine)
        assert (mine.store / "manifest/models/bad/resid/0/rows-000003.json").exists()
        assert not verify_everything_committed(mine.store)

    def test_a_value_beyond_float16_names_the_remedy(self, settings, tiny_llama, tmp_path):
        def spoil(model):
            model.model.embed_tokens.weight *= 20_000

        directory = spoiled(tiny_llama, tmp_path / "big", spoil)
        mine = at(settings, tmp_path / "store.zarr", model=(f"big={directory}",), layers=("0",), form="float16")
        message = r"model 'big', layer 0, row \d+ .*more than float16 can .65504.; use --format bf"
        with pytest.raises(NonFiniteStateError, match=message):
            run(mine)


def verify_everything_committed(path: Path) -> list[str]:
    """Committed rows of an unfinished store that are not finite."""
    store = open_store(path, allow_incomplete=True)
    return [
        f"{name}:{layer}"
        for name in store.models
        for layer in store.model(name).layers
        if not np.isfinite(store.rows(name, layer)[:]).all()
    ]


class TestRefusals:
    def test_a_layer_that_is_not_there_proposes_one_that_is(self, settings):
        with pytest.raises(LayerRangeError, match=r"layer 32 is outside 0\.\.3 of model 'llama'.*use 3 for the last"):
            prepare(dataclasses.replace(settings, layers=("0,32",)), quiet=True)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"form": "fp4"}, SpecError, "format 'fp4'"),
            ({"layer_0": "no"}, SpecError, "--layer-0 'no'"),
            ({"layout": "warm"}, SpecError, "layout 'warm'"),
            ({"shard_rows": 1000}, SpecError, "--shard-rows 1000: layout archive needs a multiple of 256"),
            ({"shard_rows": 0}, SpecError, "--shard-rows 0"),
            ({"dataset": "text:/nowhere/*"}, FeatstoreError, "no file matches"),
            ({"window_bytes": 8192}, SpecError, "more than the context of model 'llama' .1024.; use a smaller"),
            ({"model": ("llama=/nowhere",)}, ModelLoadError, "model 'llama': no directory '/nowhere'"),
            ({"model": ("llama=/nowhere/x.gguf",)}, ModelLoadError, "no GGUF file at '/nowhere/x.gguf'"),
        ],
    )
    def test_flags_are_checked_before_anything_is_written(
        self, settings, tmp_path, sample_texts, change, error, message
    ):
        if "window_bytes" in change:
            long = tmp_path / "long.txt"
            long.write_text("\n".join(sample_texts[:4]), encoding="utf-8")
            change = change | {"dataset": f"text:{long}"}
        with pytest.raises(error, match=message):
            prepare(at(settings, tmp_path / "store.zarr", **change), quiet=True)
        assert not (tmp_path / "store.zarr").exists()

    def test_a_hub_model_offline_says_what_to_do(self):
        with pytest.raises(ModelLoadError, match=r"model 'x' \(nobody/nothing\) cannot be loaded: .*HF_HUB_OFFLINE"):
            inspect_model(ModelSpec("x", "nobody/nothing"))

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"sink_threshold": 6.0}, "mask"),
            ({"max_tokens": 3000}, "max_tokens"),
            ({"window_bytes": 400}, "window_bytes"),
            ({"layer_0": "table"}, r"llama\.layer_0"),
            ({"form": "bfloat16"}, r"llama\.format"),
            ({"batch_tokens": 512}, r"llama\.batch_tokens"),
            ({"dtype": "bfloat16"}, r"llama\.compute_dtype"),
            ({"attention": "eager"}, r"llama\.attention"),
            ({"seed": 3}, "seed"),
        ],
    )
    def test_a_store_made_with_other_settings_is_not_touched(self, undisturbed, settings, change, named):
        before = tree_bytes(undisturbed)
        with pytest.raises(
            StoreStateError, match=rf"was made with other settings \(.*{named}.*\); use the same command"
        ):
            run(at(settings, undisturbed, **change))
        assert tree_bytes(undisturbed) == before

    def test_what_is_not_a_store_is_not_overwritten(self, job, tmp_path):
        (tmp_path / "file").write_text("mine")
        (tmp_path / "directory").mkdir()
        (tmp_path / "directory" / "thesis.tex").write_text("mine")
        for name, message in {"file": "is a file", "directory": "exists and is not a feature store"}.items():
            elsewhere = dataclasses.replace(job, store=tmp_path / name)
            with pytest.raises(StoreFormatError, match=message):
                extract(elsewhere, quiet=True)
        assert sorted(p.name for p in tmp_path.rglob("*")) == ["directory", "file", "thesis.tex"]


class TestSpace:
    def test_a_disk_too_small_is_refused_with_a_budget_that_would_fit(self, settings, job, tmp_path, monkeypatch):
        free = 1_000_000
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - free, free))
        mine = dataclasses.replace(job, store=tmp_path / "store.zarr")
        assert mine.state_bytes() > free
        with pytest.raises(
            NoSpaceError, match=r"store\.zarr needs .* MB and 1 MB are free; --max-tokens \d+ would"
        ) as e:
            extract(mine, quiet=True)
        assert not (tmp_path / "store.zarr").exists()
        budget = int(str(e.value).partition("--max-tokens ")[2].split()[0])
        fitting = prepare(at(settings, tmp_path / "store.zarr", max_tokens=budget), quiet=True)
        assert 0.5 * free < fitting.state_bytes() <= free
        extract(fitting, quiet=True)

    def test_states_that_are_there_already_need_no_space(self, undisturbed, job, tmp_path, monkeypatch):
        """Compressed, they weigh less than what was reserved for them."""
        llama = job.plan.models["llama"].rows * 3 * (48 * 4 + 4)
        free = job.state_bytes() - llama
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - free, free))
        mine = dataclasses.replace(job, store=tmp_path / "store.zarr")
        with pytest.raises(NoSpaceError):
            extract(mine, quiet=True)
        monkeypatch.undo()
        monkeypatch.setattr(
            "featstore.extraction.run._finish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            extract(mine, quiet=True)
        monkeypatch.undo()
        for unit in mine.store.glob("manifest/models/mistral/resid/*/rows-*.json"):
            unit.unlink()
        for layer in LAYERS["mistral"]:
            shutil.rmtree(mine.store / "models" / "mistral" / "resid" / str(layer))
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - free, free))
        extract(mine, quiet=True)
        assert tree_bytes(mine.store) == tree_bytes(undisturbed)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))
        extract(mine, quiet=True)


class TestDryRun:
    def test_it_tells_sizes_and_time_and_writes_nothing(self, job, undisturbed, tmp_path):
        mine = dataclasses.replace(job, store=tmp_path / "store.zarr")
        result = dry_run(mine)
        assert not list(tmp_path.iterdir())
        for name, layers in LAYERS.items():
            rows = open_store(undisturbed).model(name).rows
            width = open_store(undisturbed).model(name).width
            told = result["models"][name]
            assert told["tokens"] == rows
            assert told["bytes_per_layer"] == rows * (width * 4 + 4)
            assert told["bytes"] == told["bytes_per_layer"] * len(layers)
            assert told["weights_on_disk"]
            assert 0 < told["seconds"] < 60
        assert result["bytes"] == sum(m["bytes"] for m in result["models"].values()) == mine.state_bytes()
        assert result["fits"]

    def test_a_hub_models_weights_count_only_once_they_are_here(self, tmp_path, monkeypatch):
        """Its configuration is fetched before the dry run; taking that for the weights would download them."""
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        spec = ModelSpec("m", "o/r")
        assert weight_bytes(spec) is None
        repository = tmp_path / "hub" / "models--o--r"
        snapshot = repository / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "blobs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)

        def add(name: str, size: int) -> None:
            (repository / "blobs" / name).write_bytes(bytes(size))
            (snapshot / name).symlink_to(repository / "blobs" / name)

        (snapshot / "config.json").write_text("{}")
        add("tokenizer.json", 1000)
        assert weight_bytes(spec) is None
        shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
        (snapshot / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": dict(zip("abc", (*shards, shards[1]), strict=True))})
        )
        add(shards[0], 300)
        assert weight_bytes(spec) is None
        add(shards[1], 200)
        assert weight_bytes(spec) == 500
        assert weight_bytes(ModelSpec("m", "o/other")) is None

    def test_local_weights_are_what_their_files_weigh(self, tiny_llama, tmp_path):
        assert weight_bytes(ModelSpec("m", str(tiny_llama))) == (tiny_llama / "model.safetensors").stat().st_size
        (tmp_path / "x.gguf").write_bytes(bytes(77))
        assert weight_bytes(ModelSpec("m", str(tmp_path / "x.gguf"))) == 77


class TestCommands:
    """The commands that only read: one JSON object on stdout, one line on stderr, the documented exit codes."""

    def test_info(self, undisturbed, capsys):
        done = call(capsys, "featstore", "info", undisturbed, "--json")
        assert done.code == 0
        assert done.err == ""
        result = json.loads(done.out)
        assert result["fingerprint"] == open_store(undisturbed).fingerprint
        assert result["models"]["llama"]["rows"] == open_store(undisturbed).model("llama").rows

    def test_a_store_that_is_not_there_is_one_line_and_exit_2(self, capsys, tmp_path):
        done = call(capsys, "featstore", "info", tmp_path / "none.zarr", "--json")
        assert (done.code, done.out) == (2, "")
        (line,) = done.err.splitlines()
        assert line.startswith("featstore: no store at ")

    def test_inspect_shows_the_text_and_the_partners(self, undisturbed, capsys):
        done = call(capsys, "featstore", "inspect", undisturbed, "--window", 3, "--rows", 500, "--json")
        assert done.code == 0
        result = json.loads(done.out)
        store = open_store(undisturbed)
        text = store.corpus.window_text(3)
        for name in store.models:
            assert "".join(entry["text"] for entry in result["models"][name]) == text
        pairs = store.pairs("llama", "mistral")
        partner = dict(zip(pairs.row_source.tolist(), pairs.row_target.tolist(), strict=True))
        for entry in result["models"]["llama"]:
            assert entry["partner"] == {"mistral": partner.get(entry["row"])}
        plain = call(capsys, "featstore", "inspect", undisturbed, "--window", 10**6)
        assert plain.code == 2
        assert "window 1000000 is outside 0.." in plain.err

    def test_verify_exits_1_when_it_finds_damage(self, undisturbed, capsys, tmp_path):
        path = Path(shutil.copytree(undisturbed, tmp_path / "copy.zarr"))
        target = path / "models" / "llama" / "resid" / "2" / "c" / "1" / "0"
        target.write_bytes(target.read_bytes()[:-1] + b"?")
        done = call(capsys, "featstore", "verify", path, "--json")
        assert done.code == 1
        assert json.loads(done.out)["damage"] == ["models/llama/resid/2/c/1/0: checksum differs from the manifest"]

    def test_pair_adds_the_word_policy(self, undisturbed, capsys, tmp_path):
        path = Path(shutil.copytree(undisturbed, tmp_path / "copy.zarr"))
        done = call(capsys, "featstore", "pair", path, "--policy", "word", "--json")
        assert done.code == 0
        count = json.loads(done.out)["pairs"]["llama__mistral"]["pairs"]
        assert count == len(open_store(path).pairs("llama", "mistral", "word"))
        assert verify_store(path, quiet=True)["damage"] == []


def test_stopped_before_it_said_what_its_models_are_it_asks_for_them(settings, tmp_path):
    path = run(dataclasses.replace(settings, store=tmp_path / "s.zarr"))
    shutil.rmtree(path / "models" / "mistral")
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"]["featstore"]["complete"] = False
    (path / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(StoreStateError, match=r"was stopped before it said what mistral is; .*with its --model values"):
        prepare(dataclasses.replace(settings, store=path, given=frozenset()), quiet=True)
