"""The same store in another format or layout: same values where they can be, all else untouched, safe to kill."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from featstore import open_store
from featstore.errors import (
    CorruptDataError,
    NonFiniteStateError,
    NoSpaceError,
    SpecError,
    StoreBusyError,
    StoreFormatError,
    StoreStateError,
)
from featstore.store.conversion import convert as convert_module
from featstore.store.conversion.convert import convert
from featstore.store.format.elements import FORMATS, Encoded, column_scale_of
from featstore.store.format.shards import LAYOUTS
from featstore.store.inspect.verify import verify_store
from featstore.store.moments.stored import StoredMoments
from featstore.store.moments.writing import add_moments
from featstore.store.write.index import add_pairs
from featstore.store.write.row_writer import RowArrays
from featstore.store.write.table import write_table
from featstore.store.write.writer import StoreWriter, exclusive
from tests.support import ROOT
from tests.support.commands import call
from tests.support.store_fixtures import MODELS, Recipe, states, tree_bytes, write_quickly

LAYER = 3
LOSSLESS = [("bfloat16", "float32"), ("float16", "float32"), ("int8", "float32"), ("fp8", "float32")]


@pytest.fixture(autouse=True)
def _no_power_cut(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


def recipe(form: str = "bfloat16", layout: str = "hot") -> Recipe:
    return Recipe(
        form=form, layout=layout, shard_rows=1024 if layout == "hot" else 768, documents=24, seed=3, roles=(2, 3)
    )


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A hot store of every format, with both pair indexes, and moments in one of them."""
    root = tmp_path_factory.mktemp("sources")
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        for form in FORMATS:
            made[form] = write_quickly(root / f"{form}.zarr", recipe(form))
            add_pairs(made[form], "word")
        add_moments(made["bfloat16"], quiet=True)
    return made


def rows_of(path: Path) -> dict[tuple[str, int], np.ndarray]:
    store = open_store(path)
    return {(name, k): store.rows(name, k)[:] for name in store.models for k in store.model(name).layers}


def row_files(path: Path) -> dict[str, bytes]:
    kinds = ("resid", "norm", "row_scale", "column_scale", "embedding")
    return {name: data for name, data in tree_bytes(path).items() if any(f"/{kind}/" in name for kind in kinds)}


def no_damage(path: Path) -> None:
    assert verify_store(path, quiet=True)["damage"] == []


def assert_same_rows(first: Path, second: Path) -> None:
    one, two = rows_of(first), rows_of(second)
    assert one.keys() == two.keys()
    for site in one:
        np.testing.assert_array_equal(one[site], two[site])


class TestWhereNoValueChanges:
    @pytest.mark.parametrize("form", FORMATS)
    def test_hot_to_archive_and_back_gives_the_same_files(self, stores, tmp_path, form):
        there = convert(stores[form], tmp_path / "there.zarr", layout="archive", quiet=True)
        assert there["exact"]
        assert there["relative_error"] is None
        assert there["dropped"] == []
        assert open_store(tmp_path / "there.zarr").rows("a", LAYER).layout.name == "archive"
        assert open_store(tmp_path / "there.zarr").model("a").attributes["layout"] == "archive"
        assert_same_rows(stores[form], tmp_path / "there.zarr")
        no_damage(tmp_path / "there.zarr")
        convert(tmp_path / "there.zarr", tmp_path / "back.zarr", layout="hot", quiet=True)
        before, after = tree_bytes(stores[form]), tree_bytes(tmp_path / "back.zarr")
        about_itself = {
            "zarr.json",
            "manifest/index",
            "manifest/metadata.json",
            *(f"models/{name}/zarr.json" for name in MODELS),
        }
        assert {n: d for n, d in after.items() if n not in about_itself} == {
            n: d for n, d in before.items() if n not in about_itself
        }
        assert open_store(tmp_path / "back.zarr").fingerprint == open_store(stores[form]).fingerprint

    @pytest.mark.parametrize(("form", "wider"), LOSSLESS)
    def test_float32_holds_every_other_format(self, stores, tmp_path, form, wider):
        path = tmp_path / "wide.zarr"
        assert convert(stores[form], path, form=wider, quiet=True)["exact"]
        assert_same_rows(stores[form], path)
        for name in MODELS:
            np.testing.assert_array_equal(
                open_store(path).norms(name, LAYER), open_store(stores[form]).norms(name, LAYER)
            )
        assert not (path / "models/a/row_scale").exists()
        assert not (path / "models/a/column_scale").exists()
        no_damage(path)

    def test_norms_are_copied_to_the_last_bit(self, tiny_store, tmp_path):
        """An extraction takes them with torch, whose sums differ from numpy's in the last bit."""
        convert(tiny_store, tmp_path / "wide.zarr", form="float32", quiet=True)
        for name in ("llama", "mistral"):
            old, new = (open_store(p).norms(name, 2) for p in (tiny_store, tmp_path / "wide.zarr"))
            np.testing.assert_array_equal(old, new)
            rows = open_store(tiny_store).rows(name, 2)[:]
            assert (np.linalg.norm(rows, axis=1).astype(np.float32) != old).any()
        no_damage(tmp_path / "wide.zarr")

    def test_bfloat16_to_float32_and_back_gives_the_same_rows(self, stores, tmp_path):
        convert(stores["bfloat16"], tmp_path / "wide.zarr", form="float32", quiet=True)
        back = convert(tmp_path / "wide.zarr", tmp_path / "back.zarr", form="bfloat16", quiet=True)
        assert not back["exact"]  # nobody knows beforehand that these rows were bfloat16 once
        assert {e for layers in back["relative_error"].values() for k in layers.values() for e in k.values()} == {0.0}
        np.testing.assert_array_equal(
            open_store(tmp_path / "back.zarr").rows("a", LAYER).stored(slice(None)),
            open_store(stores["bfloat16"]).rows("a", LAYER).stored(slice(None)),
        )

    def test_another_shard_length_alone(self, stores, tmp_path):
        path = tmp_path / "long.zarr"
        assert convert(stores["int8"], path, shard_rows=4096, quiet=True)["exact"]
        assert open_store(path).rows("b", LAYER).shard_rows == 4096
        assert_same_rows(stores["int8"], path)
        no_damage(path)

    def test_moments_go_along(self, stores, tmp_path):
        path = tmp_path / "archive.zarr"
        result = convert(stores["bfloat16"], path, form="float32", layout="archive", quiet=True)
        assert result["dropped"] == []
        old, new = (
            StoredMoments(open_store(p), *MODELS).read(("a", 3), ("b", 3), 0) for p in (stores["bfloat16"], path)
        )
        assert old is not None
        assert new is not None
        np.testing.assert_array_equal(old.c, new.c)
        no_damage(path)


class TestWhereValuesAreRounded:
    @pytest.mark.parametrize("form", ["bfloat16", "float16", "int8", "fp8"])
    def test_rows_are_those_of_the_format_and_the_result_says_how_far_they_moved(self, stores, tmp_path, form):
        path = tmp_path / "narrow.zarr"
        result = convert(stores["float32"], path, form=form, layout="archive", quiet=True)
        assert not result["exact"]
        store = open_store(path)
        for name in MODELS:
            rows = store.model(name).rows
            raw = states(recipe(), name, LAYER, rows)
            scale = store.vector(f"models/{name}/column_scale/{LAYER}") if form == "int8" else None
            encoded = FORMATS[form].encode(raw, scale)
            np.testing.assert_array_equal(store.rows(name, LAYER).stored(slice(None)), encoded.stored)
            np.testing.assert_array_equal(store.norms(name, LAYER), encoded.norms)
            decoded = store.rows(name, LAYER)[:]
            error = np.linalg.norm(decoded - raw, axis=1) / np.linalg.norm(raw, axis=1)
            told = result["relative_error"][name][str(LAYER)]
            assert rows > 1024  # the figure is of a sample
            assert told["median"] == pytest.approx(np.median(error), rel=0.2)
            assert 0 < told["median"] < told["max"] <= error.max() * 1.0001
        no_damage(path)

    def test_column_scales_are_those_of_the_pilots_rows(self, stores, tmp_path):
        path = tmp_path / "narrow.zarr"
        convert(stores["float32"], path, form="int8", quiet=True)
        store = open_store(path)
        for name in MODELS:
            # A quarter of the rows, cut where a window begins, without the loud ones.
            window = store.tokens(name).window
            quarter = len(window) // 4
            end = (
                quarter if window[quarter] != window[quarter - 1] else int(np.flatnonzero(window == window[quarter])[0])
            )
            rows = states(recipe(), name, LAYER, len(window))[:end]
            norms = np.linalg.norm(rows, axis=1)
            assert (norms > 5 * np.median(norms)).any()
            expected = column_scale_of(rows[norms <= 5 * np.median(norms)])
            np.testing.assert_array_equal(store.vector(f"models/{name}/column_scale/{LAYER}"), expected)

    def test_masks_pairs_and_pilot_stay_and_moments_are_left_out_and_said_so(self, stores, tmp_path):
        path = tmp_path / "narrow.zarr"
        result = convert(stores["bfloat16"], path, form="fp8", quiet=True)
        old, new = open_store(stores["bfloat16"]), open_store(path)
        assert len(result["dropped"]) == 3 * 10
        assert all(unit.startswith("moments/a__b/") for unit in result["dropped"])
        assert not (path / "moments").exists()
        assert "moments" in convert_module.describe_conversion(result)
        for name in MODELS:
            np.testing.assert_array_equal(old.tokens(name).sink, new.tokens(name).sink)
            np.testing.assert_array_equal(old.origin(name, LAYER), new.origin(name, LAYER))
            assert old.median_norms(name) == new.median_norms(name)
        for policy in ("end", "word"):
            np.testing.assert_array_equal(
                old.pairs("a", "b", policy).row_target, new.pairs("a", "b", policy).row_target
            )
        assert old.corpus.text.tobytes() == new.corpus.text.tobytes()

    def test_where_it_came_from_is_on_record_through_every_link(self, stores, tmp_path):
        convert(stores["float32"], tmp_path / "b.zarr", form="int8", quiet=True)
        convert(tmp_path / "b.zarr", tmp_path / "c.zarr", form="float32", quiet=True)
        told = open_store(tmp_path / "c.zarr").attributes["converted_from"]
        assert told["fingerprint"] == open_store(tmp_path / "b.zarr").fingerprint
        assert told["models"]["a"]["format"] == "int8"
        assert told["exact"]
        assert told["converted_from"]["fingerprint"] == open_store(stores["float32"]).fingerprint
        assert not told["converted_from"]["exact"]
        assert told["converted_from"]["converted_from"] is None

    def test_what_float16_cannot_hold_is_named(self, tmp_path, monkeypatch):
        from tests.support import store_fixtures

        def loud(recipe, model, layer, rows):
            values = states(recipe, model, layer, rows)
            values[1100] *= 1e6
            return values

        monkeypatch.setattr(store_fixtures, "states", loud)
        path = write_quickly(tmp_path / "loud.zarr", recipe("float32"))
        with pytest.raises(NonFiniteStateError, match=r"model 'a', layer 0, counted from row 1024: row 76 holds"):
            convert(path, tmp_path / "half.zarr", form="float16", quiet=True)


@pytest.fixture
def with_table(tmp_path) -> Path:
    """A store whose layer 0 is a table: the rows of layer 0 of the fixture, each token's first."""
    path = write_quickly(tmp_path / "table.zarr", recipe("float32"))
    store = open_store(path)
    with exclusive(path):
        writer = StoreWriter(path)
        for name in MODELS:
            tokens, rows = store.tokens(name), store.rows(name, 0)[:]
            ids, first = np.unique(tokens.id, return_index=True)
            shape = RowArrays(len(tokens.id), 8, (3,), 1024, FORMATS["float32"], LAYOUTS["hot"])
            part = Encoded(rows[first], np.linalg.norm(rows[first], axis=1).astype(np.float32))
            write_table(writer, name, ids, [part], shape, basis="tokens")
            for kind in ("resid", "norm"):
                shutil.rmtree(path / "models" / name / kind / "0")
            for shard in range(shape.shards):
                writer.drop(f"models/{name}/resid/0/rows-{shard:06d}")
            writer.group(f"models/{name}", {"featstore": store.model(name).attributes | {"layer_0": "table"}})
            sink = np.zeros(len(tokens.id), bool)
            for layer in (0, 3):
                median = store.median_norms(name)[str(layer)]
                wide = rows[first][np.searchsorted(ids, tokens.id)] if layer == 0 else store.rows(name, 3)[:]
                sink |= np.linalg.norm(wide, axis=1) > 5 * median
            writer.vectors(f"models/{name}/sinks", {f"models/{name}/tokens/sink": sink})
        writer.seal({"featstore": store.attributes})
    no_damage(path)
    return path


@pytest.mark.parametrize("form", ["bfloat16", "int8", "fp8"])
def test_a_table_is_converted_too(with_table, tmp_path, form):
    path = tmp_path / "narrow.zarr"
    result = convert(with_table, path, form=form, layout="archive", quiet=True)
    old, new = open_store(with_table), open_store(path)
    assert (path / "models/a/embedding/state/zarr.json").is_file()
    assert not (path / "models/a/resid/0").exists()
    for name in MODELS:
        reader = new.rows(name, 0)
        assert (reader.form.name, reader.layout.name) == (form, "archive")
        scale = new.vector(f"models/{name}/column_scale/0") if form == "int8" else None
        encoded = FORMATS[form].encode(old.rows(name, 0)[:], scale)
        np.testing.assert_array_equal(reader.stored(slice(None)), encoded.stored)
        np.testing.assert_array_equal(new.norms(name, 0), encoded.norms)
        assert result["relative_error"][name]["0"]["max"] > 0
    no_damage(path)
    assert convert(path, tmp_path / "wide.zarr", form="float32", quiet=True)["exact"]
    assert_same_rows(path, tmp_path / "wide.zarr")
    no_damage(tmp_path / "wide.zarr")


class TestRefusals:
    def test_nothing_to_do(self, stores, tmp_path):
        with pytest.raises(SpecError, match="is bfloat16 hot already"):
            convert(stores["bfloat16"], tmp_path / "x.zarr", form="bfloat16", layout="hot", shard_rows=1024)
        with pytest.raises(SpecError, match="is bfloat16 hot already"):
            convert(stores["bfloat16"])
        assert not (tmp_path / "x.zarr").exists()

    @pytest.mark.parametrize("where", [".", "inside.zarr", "..", "../again/../{name}"])
    def test_a_conversion_is_no_part_of_its_source(self, stores, where):
        path = stores["float32"]
        before = tree_bytes(path)
        with pytest.raises(SpecError, match="overlaps"):
            convert(path, path / where.format(name=path.name), form="bfloat16", quiet=True)
        assert tree_bytes(path) == before

    def test_what_is_there_and_something_else_stays(self, stores, tmp_path):
        (tmp_path / "dir").mkdir()
        (tmp_path / "dir" / "thesis.txt").write_text("mine")
        (tmp_path / "dir" / ".notes.part").write_text("mine, too")
        (tmp_path / "file").write_text("mine")
        other = write_quickly(tmp_path / "other.zarr", recipe())
        before = tree_bytes(tmp_path)
        for name in ("dir", "file"):
            with pytest.raises(StoreFormatError, match="choose another path"):
                convert(stores["float32"], tmp_path / name, form="fp8", quiet=True)
        with pytest.raises(StoreStateError, match="is not this conversion of"):
            convert(stores["float32"], other, form="fp8", quiet=True)
        assert tree_bytes(tmp_path) == before

    @pytest.mark.parametrize("change", [{"form": "bfloat16"}, {"layout": "archive"}, {"shard_rows": 2048}, "source"])
    def test_another_conversion_stays(self, stores, tmp_path, change):
        path = tmp_path / "x.zarr"
        convert(stores["float32"], path, form="fp8", quiet=True)
        before = tree_bytes(path)
        assert convert(stores["float32"], path, form="fp8", quiet=True)["store"] == str(path)  # done already
        source, wanted = (stores["float32"], change) if change != "source" else (stores["float16"], {})
        with pytest.raises(StoreStateError, match="is not this conversion of"):
            convert(source, path, **{"form": "fp8", **wanted}, quiet=True)
        assert tree_bytes(path) == before

    def test_shards_must_fit_the_layout(self, tmp_path):
        path = write_quickly(tmp_path / "s.zarr", recipe(layout="archive"))
        with pytest.raises(SpecError, match=r"layout hot needs a multiple of 1024; add --shard-rows 1024"):
            convert(path, layout="hot")
        assert convert(path, layout="hot", shard_rows=1024, quiet=True)["exact"]

    def test_unknown_words(self, stores):
        with pytest.raises(SpecError, match="format 'int4'"):
            convert(stores["float32"], form="int4")
        with pytest.raises(SpecError, match="layout 'cold'"):
            convert(stores["float32"], layout="cold")

    def test_a_disk_that_cannot_hold_it(self, stores, tmp_path, monkeypatch):
        monkeypatch.setattr("featstore.store.write.space.free_bytes", lambda _: 10_000)
        with pytest.raises(NoSpaceError, match="name another disk with --out"):
            convert(stores["float32"], tmp_path / "x.zarr", form="fp8")
        assert not (tmp_path / "x.zarr").exists()

    def test_another_process_at_work(self, stores, tmp_path):
        with exclusive(tmp_path / "x.zarr"), pytest.raises(StoreBusyError):
            convert(stores["float32"], tmp_path / "x.zarr", form="fp8", quiet=True)

    def test_a_damaged_source_is_not_carried_on(self, stores, tmp_path):
        path = tmp_path / "s.zarr"
        shutil.copytree(stores["float32"], path)
        for name, message in (
            ("models/a/resid/3/c/0/0", "checksum mismatch"),
            ("models/b/tokens/id/c/0", "is not the file that the manifest records"),
        ):
            whole = (path / name).read_bytes()
            (path / name).write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
            with pytest.raises(CorruptDataError, match=message):
                convert(path, tmp_path / f"out-{len(whole)}.zarr", form="fp8", quiet=True)
            (path / name).write_bytes(whole)

    def test_moments_without_rows(self, stores, tmp_path, monkeypatch):
        monkeypatch.setattr(convert_module, "has_rows", lambda *_: False)
        with pytest.raises(StoreStateError, match="holds no rows of layer 0 of 'a'"):
            convert(stores["bfloat16"], tmp_path / "x.zarr", form="fp8")


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.support import store_fixtures as made
from featstore.store.conversion.convert import convert

root, source = Path(sys.argv[1]), Path(sys.argv[2])
os.fsync = lambda _: None

def work(path):
    convert(source, path, form="int8", layout="archive", shard_rows=512, quiet=True)

work(root / "whole")
expected = made.tree_bytes(root / "whole")

def dying_after(steps):
    left, real = [steps], os.replace
    def replace(*args, **options):
        for when in ("before", "after"):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            if when == "before":
                real(*args, **options)
    os.replace = replace

step = killed = 0
while True:
    path = root / f"s{step}"
    child = os.fork()
    if child == 0:
        dying_after(step)
        work(path)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        break
    killed += 1
    work(path)
    found = made.tree_bytes(path)
    if found != expected:
        different = sorted(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k))
        sys.exit(f"killed at step {step}: {different} differ")
    step += int(sys.argv[3])
print(killed)
"""


@pytest.mark.parametrize(("stride", "least"), [(49, 2), pytest.param(7, 20, marks=pytest.mark.thorough)])
def test_killed_at_any_step_it_goes_on_and_ends_with_the_same_bytes(tmp_path, stride, least):
    source = write_quickly(
        tmp_path / "source.zarr", Recipe(form="float32", layout="archive", shard_rows=256, documents=8)
    )
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path, source, str(stride)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > least


def test_what_is_there_is_not_written_again(stores, tmp_path, monkeypatch):
    path = tmp_path / "x.zarr"
    commit, written = StoreWriter.commit, []

    def stopping(self, unit, files, **facts):
        if unit == "models/b/resid/3/rows-000000":
            raise KeyboardInterrupt
        commit(self, unit, files, **facts)
        written.append(unit)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "commit", stopping)
        with pytest.raises(KeyboardInterrupt):
            convert(stores["float32"], path, form="int8", quiet=True)
    with pytest.raises(StoreStateError, match="unfinished"):
        open_store(path)
    first = set(written)
    written.clear()
    encode, encoded = convert_module._Conversion._encode, []

    def watched(self, name, reader, norms, span, arrays, layer, what):
        encoded.append((name, layer))
        return encode(self, name, reader, norms, span, arrays, layer, what)

    monkeypatch.setattr(convert_module._Conversion, "_encode", watched)
    monkeypatch.setattr(StoreWriter, "commit", lambda s, u, f, **x: (written.append(u), commit(s, u, f, **x)))
    convert(stores["float32"], path, form="int8", quiet=True)
    assert written
    assert not first & set(written)
    assert set(encoded) == {("b", 3)}


def test_memory_is_bounded_by_a_shard(stores, tmp_path, monkeypatch):
    """Not a byte count but its cause: no call decodes more than a step of rows, one shard is open at a time."""
    from featstore.store.write.row_writer import RowWriter

    longest, most = 0, 0
    encode, put = convert_module._Conversion._encode, RowWriter.put

    def watched(self, name, reader, norms, span, *rest):
        nonlocal longest
        longest = max(longest, span[1] - span[0])
        return encode(self, name, reader, norms, span, *rest)

    def counted(self, *args):
        nonlocal most
        put(self, *args)
        most = max(most, len(self._open))

    monkeypatch.setattr(convert_module._Conversion, "_encode", watched)
    monkeypatch.setattr(RowWriter, "put", counted)
    convert(stores["float32"], tmp_path / "x.zarr", form="bfloat16", quiet=True)
    assert 0 < longest <= 1024
    assert most == 1


def test_the_command(stores, tmp_path, capsys):
    path = tmp_path / "mine.zarr"
    shutil.copytree(stores["float32"], path)
    told = call(capsys, "featstore", "convert", path, "--format", "int8", "--layout", "archive", "--json").json
    assert told["store"] == str(tmp_path / "mine-int8-archive.zarr")
    assert told["bytes"] < told["bytes_before"] * 0.6
    assert not told["exact"]
    no_damage(tmp_path / "mine-int8-archive.zarr")
    words = ("--layout", "archive", "--shard-rows", "2048", "--out", tmp_path / "out.zarr")
    said = call(capsys, "featstore", "convert", path, *words)
    assert "readers see exactly the values they saw before" in said.out
    assert open_store(tmp_path / "out.zarr").rows("a", 0).shard_rows == 2048
    assert "name another --format" in call(capsys, "featstore", "convert", path).refusal
