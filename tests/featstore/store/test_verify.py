"""What `verify` finds beyond checksums: contents that contradict each other, the text, or the models."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore import open_store
from featstore.errors import SpecError, StoreStateError
from featstore.extraction.job import prepare
from featstore.extraction.reextract import COMPUTE_TOLERANCE, check_tokens, planned_batches, reextract, rounding_bound
from featstore.extraction.run import extract
from featstore.extraction.settings import Settings
from featstore.models.references import Allowed
from featstore.store.conversion.convert import convert
from featstore.store.format.elements import FORMATS, Encoded, column_scale_of
from featstore.store.format.shards import LAYOUTS
from featstore.store.inspect.verify import verify_store
from featstore.store.write.index import add_pairs
from featstore.store.write.row_writer import RowArrays, RowWriter, rows_unit
from featstore.store.write.writer import StoreWriter
from featstore.text.plan import Plan
from tests.support.commands import call
from tests.support.store_fixtures import Recipe, write_quickly

SYNTHETIC = Recipe(form="int8", layout="archive", shard_rows=256, documents=10, layers=(0, 3))


@pytest.fixture(autouse=True)
def _no_power_cut(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    path = write_quickly(tmp_path_factory.mktemp("sound") / "s.zarr", SYNTHETIC)
    add_pairs(path, "word")
    return path


@pytest.fixture
def path(sound, tmp_path) -> Path:
    shutil.copytree(sound, tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


def reseal(path: Path) -> None:
    """What a writer with a bug would have written: wrong, with correct checksums."""
    root = open_store(path, allow_incomplete=True).attributes
    StoreWriter(path).seal({"featstore": root})


def rewrite(path: Path, unit: str, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Change arrays of a unit of small arrays and seal again."""
    writer, store = StoreWriter(path), open_store(path)
    entry = writer.entry(unit)
    names = {name.split("/c/")[0] for name in entry["files"]}
    arrays = {name: store.vector(name).copy() for name in names}
    change(arrays)
    writer.vectors(unit, arrays, **{k: v for k, v in entry.items() if k not in ("unit", "files")})
    reseal(path)


def damage(path: Path) -> list[str]:
    return verify_store(path, quiet=True)["damage"]


class TestContents:
    """Every checksum is right in all of these."""

    def test_nothing_is_wrong_with_what_is_right(self, sound):
        found = verify_store(sound, quiet=True)
        assert found["damage"] == []
        assert found["not_checked"] == []

    @pytest.mark.parametrize(
        ("column", "change", "message"),
        [
            ("byte_end", lambda c: c.__setitem__(5, 10_000), "a: a token ends beyond its window"),
            ("byte_end", lambda c: c.__setitem__(5, -1), "a: a token ends beyond its window"),
            ("byte_end", lambda c: c.__setitem__(5, 0), "a: a token ends before the one that precedes it"),
            ("special", lambda c: c.__setitem__(5, True), "a: a special token claims to have read text"),
            ("window", lambda c: c.__setitem__(-1, c[-1] + 1), "a: the tokens' windows are not those of the corpus"),
            ("window", lambda c: c.__setitem__(3, c[-1]), "a: the tokens' windows are not those of the corpus"),
        ],
    )
    def test_tokens(self, path, column, change, message):
        rewrite(path, "models/a/tokens", lambda arrays: change(arrays[f"models/a/tokens/{column}"]))
        assert any(line.startswith(message) for line in damage(path)), damage(path)

    def test_tokens_that_stop_before_the_text_does(self, path):
        store = open_store(path)
        table = store.tokens("a")
        last = np.flatnonzero(np.diff(table.window))[0]
        text = store.corpus.window_text(0).encode()
        stop = next(i for i in range(len(text), 0, -1) if text[i - 1 : i].strip()) - 1

        def shorten(arrays):
            ends = arrays["models/a/tokens/byte_end"]
            ends[: last + 1] = np.minimum(ends[: last + 1], stop)

        rewrite(path, "models/a/tokens", shorten)
        assert "a: the tokens of window 0 end before its text does" in damage(path)

    @pytest.mark.parametrize(
        ("array", "change", "message"),
        [
            ("window/start", lambda c: c.__setitem__(1, c[1] + 1), "corpus: the windows do not cover the documents"),
            ("window/end", lambda c: c.__setitem__(-1, c[-1] - 1), "corpus: the windows do not cover the documents"),
            ("document/split", lambda c: c.__setitem__(0, 3), "corpus: document 0 has split 3, not 0 to 2"),
            ("text", lambda c: c.__setitem__(3, 0xFF), "corpus: window 0 is not UTF-8"),
        ],
    )
    def test_corpus(self, path, array, change, message):
        rewrite(path, "corpus", lambda arrays: change(arrays[f"corpus/{array}"]))
        assert any(line.startswith(message) for line in damage(path)), damage(path)

    def test_sinks(self, path):
        rewrite(path, "models/b/sinks", lambda a: np.logical_not(*[a["models/b/tokens/sink"][7:9]] * 2))
        assert "b: the sink mask is not that of the norms at 2 rows, first at row 7" in damage(path)

    @pytest.mark.parametrize("policy", ["end", "word"])
    def test_a_pair_that_is_left_out(self, path, policy):
        base = f"pairs/a__b/{policy}"
        store = open_store(path)
        pairs = store.pairs("a", "b", policy)
        entry = StoreWriter(path).entry(base)
        StoreWriter(path).vectors(
            base, {f"{base}/row_a": pairs.row_source[1:], f"{base}/row_b": pairs.row_target[1:]}, basis=entry["basis"]
        )
        reseal(path)
        (line,) = damage(path)
        assert line.endswith(f"{base}/row_a/zarr.json: shape [{len(pairs) - 1}], expected [{len(pairs)}]; restore the "
                             "store or extract again")  # fmt: skip
        group = StoreWriter(path).attributes(base)["featstore"]
        StoreWriter(path).group(base, {"featstore": group | {"pairs": len(pairs) - 1}})
        reseal(path)
        what = "pairs of a and b" + " (word)" * (policy == "word")
        assert f"{what}: they are not all those, and only those, that the tokens make" in damage(path)
        assert f"{what}: the recorded coverage is not that of the tokens" in damage(path)

    def test_pairs_that_do_not_belong_together(self, path):
        rewrite(path, "pairs/a__b/word", lambda a: a["pairs/a__b/word/row_b"].__setitem__(0, 0))
        assert damage(path) == ["pairs of a and b (word): 1 do not end at the same byte"]

    @pytest.mark.parametrize(("value", "words"), [(np.nan, "column scales"), (0, "column scales")])
    def test_column_scales(self, path, value, words):
        rewrite(path, "models/a/pilot-3", lambda a: a["models/a/column_scale/3"].__setitem__(2, value))
        assert f"a: layer 3: the {words} are not 8 positive numbers" in damage(path)

    def test_an_origin(self, path):
        rewrite(path, "models/a/pilot-3", lambda a: a["models/a/origin/3"].__setitem__(2, np.inf))
        assert "a: layer 3: the origin is not 8 finite numbers" in damage(path)

    @pytest.mark.parametrize("value", [np.nan, -1.0])
    def test_row_scales(self, path, value):
        store = open_store(path)
        reader, rows, norms = store.rows("a", 3), store.model("a").rows, store.norms("a", 3)
        scales = {3: store.vector("models/a/column_scale/3")}
        arrays = RowArrays(rows, 8, (3,), 256, FORMATS["int8"], LAYOUTS["archive"], scales)
        StoreWriter(path).drop(rows_unit("a", 3, 0))
        number = np.arange(256)
        scale = reader.row_scale(number).copy()
        scale[9] *= value
        target = RowWriter(StoreWriter(path), "a", arrays)
        target.put(0, 3, Encoded(reader.stored(number), norms[:256], scale))
        target.advance(256)
        reseal(path)
        found = damage(path)
        assert f"a: layer 3: the row scales are not {rows} finite numbers" in found
        assert ("a: layer 3, row 9: the state is not finite or differs from its norm" in found) == np.isnan(value)

    def test_a_mask_that_a_rounding_conversion_kept_is_no_damage_but_a_foreign_one_is(self, tmp_path):
        """Norms within rounding of the threshold may lie on its other side now."""
        source = write_quickly(tmp_path / "s.zarr", replace(SYNTHETIC, form="float32", layout="hot", shard_rows=1024))
        norms, medians = open_store(source).norms("a", 3), open_store(source).median_norms("a")
        # The threshold lies right at one row's norm, so that rounding decides.
        close = float(norms[np.argsort(norms)[-40]] / medians["3"])
        writer = StoreWriter(source)
        root = open_store(source).attributes | {"mask": {"sink_threshold": close * (1 + 1e-6)}}
        for name in ("a", "b"):
            from featstore.store.write.index import sink_mask

            mask = sink_mask(open_store(source), name, close * (1 + 1e-6))
            writer.vectors(f"models/{name}/sinks", {f"models/{name}/tokens/sink": mask})
        writer.seal({"featstore": root})
        assert damage(source) == []
        flipped = 0
        for form in ("int8", "fp8", "bfloat16", "float16"):
            path = tmp_path / f"{form}.zarr"
            convert(source, path, form=form, quiet=True)
            store = open_store(path)
            flipped += int((store.norms("a", 3) > close * (1 + 1e-6) * medians["3"]).sum()) != int(
                (norms > close * (1 + 1e-6) * medians["3"]).sum()
            )
            assert damage(path) == []
        assert flipped
        rewrite(path, "models/a/sinks", lambda a: np.logical_not(*[a["models/a/tokens/sink"]] * 2))
        assert any("the sink mask is not that of the norms" in line for line in damage(path))


# Against the tokenizers -----------------------------------------------------------------------------------------------


@pytest.fixture
def real(tiny_store, tmp_path) -> Path:
    shutil.copytree(tiny_store, tmp_path / "real.zarr")
    return tmp_path / "real.zarr"


class TestTokensAgainstText:
    def test_they_are_those_of_the_text(self, tiny_store):
        found = check_tokens(open_store(tiny_store), quiet=True)
        assert found == {"tokenized": ["llama", "mistral"], "damage": [], "not_checked": []}

    def test_a_token_that_is_another_one(self, real):
        row = open_store(real).model("mistral").rows - 3
        rewrite(real, "models/mistral/tokens", lambda a: a["models/mistral/tokens/id"].__setitem__(row, 5))
        assert damage(real) == []  # nothing in the store contradicts it
        window = open_store(real).tokens("mistral").window[row]
        found = check_tokens(open_store(real), quiet=True)
        assert found["damage"] == [f"mistral: tokens/id of window {window} are not those of its text"]
        assert found["tokenized"] == ["llama"]

    def test_what_cannot_be_checked_is_said(self, real, sound, tiny_mistral):
        asked = check_tokens(open_store(sound), (), Allowed(references=True), quiet=True)
        assert len(asked["not_checked"]) == 2
        writer = StoreWriter(real)
        values = open_store(real).model("llama").attributes
        writer.group("models/llama", {"featstore": values | {"reference": "/nowhere/at/all"}})
        reseal(real)
        found = check_tokens(open_store(real), (), Allowed(references=True), quiet=True)
        assert found["tokenized"] == ["mistral"]
        assert "no directory '/nowhere/at/all'" in found["not_checked"][0]
        # What takes the place of a reference that nobody named needs no word.
        elsewhere = check_tokens(open_store(real), [f"llama={tiny_mistral}"], quiet=True)
        assert elsewhere["not_checked"] == ["llama: tokens against text, as its tokenizer has changed since"]
        with pytest.raises(SpecError, match="holds llama, mistral, name one of these"):
            check_tokens(open_store(real), ["other=/x"], quiet=True)


# Against the models ---------------------------------------------------------------------------------------------------


class TestReextract:
    def test_every_bit_is_the_same_here(self, tiny_store):
        found = reextract(tiny_store, 3, quiet=True)
        assert found["damage"] == []
        for name, model in found["models"].items():
            assert model["same_environment"]
            assert (model["device"], model["dtype"], model["batches"]) == ("cpu", "float32", 3)
            assert set(model["layers"]) == {str(k) for k in open_store(tiny_store).model(name).layers}
            for figures in model["layers"].values():
                assert figures["identical"] == figures["rows"] == model["rows"] > 500
                assert 0 < figures["max"] <= 2**-8  # the rounding to bfloat16, and nothing else
                assert figures["beyond"] == 0

    def test_a_row_of_another_token_is_damage(self, real):
        store = open_store(real)
        model = store.model("llama")
        arrays = RowArrays(model.rows, model.width, (2,), 2048, FORMATS["bfloat16"], LAYOUTS["hot"])
        stored, norms = store.rows("llama", 2).stored(slice(0, 2048)).copy(), store.norms("llama", 2)[:2048].copy()
        for array in (stored, norms):
            array[[100, 300]] = array[[300, 100]]
        writer = StoreWriter(real)
        writer.drop(rows_unit("llama", 2, 0))
        target = RowWriter(writer, "llama", arrays)
        target.put(0, 2, Encoded(stored, norms))
        target.advance(2048)
        reseal(real)
        assert damage(real) == []  # the store agrees with itself
        found = reextract(real, 10**6, quiet=True)
        (line,) = found["damage"]
        assert line.startswith("llama: layer 2, row ")
        assert line.endswith("2 such rows)")
        assert found["models"]["llama"]["layers"]["2"]["beyond"] == 2
        assert found["models"]["llama"]["layers"]["3"]["beyond"] == 0
        assert found["models"]["llama"]["rows"] == model.rows  # all batches are all rows

    @pytest.mark.parametrize("form", ["int8", "fp8", "float16"])
    def test_a_converted_store_is_within_its_rounding(self, tiny_store, tmp_path, form):
        """Another shard length forms other groups; the batches are those of the extraction all the same."""
        path = tmp_path / "c.zarr"
        convert(tiny_store, path, form=form, layout="archive", shard_rows=512, quiet=True)
        found = reextract(path, 2, quiet=True)
        assert found["damage"] == []
        original = reextract(tiny_store, 2, quiet=True)
        for name, model in found["models"].items():
            assert model["rows"] == original["models"][name]["rows"]
            for layer, figures in model["layers"].items():
                assert 0 < original["models"][name]["layers"][layer]["median"] <= figures["median"] * 1.001
                assert figures["max"] <= figures["tolerance"] < 0.5

    def test_a_table_too(self, tiny_llama, tiny_mistral, short_corpus, tmp_path):
        settings = Settings(
            model=(f"llama={tiny_llama}", f"mistral={tiny_mistral}"),
            layers=("0,2",),
            dataset=f"jsonl:{short_corpus}",
            store=tmp_path / "t.zarr",
            max_documents=8,
            window_bytes=512,
            batch_tokens=1024,
            shard_rows=1024,
            form="int8",
            layer_0="table",
            device="cpu",
        )
        extract(prepare(settings, quiet=True), quiet=True)
        assert damage(settings.store) == []
        found = reextract(settings.store, 2, quiet=True)
        assert found["damage"] == []
        assert all(m["layers"]["0"]["identical"] == m["rows"] for m in found["models"].values())

    def test_other_models_are_told_apart(self, tiny_store, tiny_mistral, tmp_path, tiny_llama):
        found = reextract(tiny_store, 1, model=[f"llama={tiny_mistral}"], quiet=True)
        assert found["damage"] == [f"llama: {tiny_mistral} is not the model of this store (its configuration differs)"]
        import torch
        from transformers import AutoModelForCausalLM

        trained = AutoModelForCausalLM.from_pretrained(tiny_llama)
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter += 1e-3
        shutil.copytree(tiny_llama, tmp_path / "trained")
        trained.save_pretrained(tmp_path / "trained")
        found = reextract(tiny_store, 1, model=[f"llama={tmp_path / 'trained'}"], quiet=True)
        assert found["damage"] == [
            f"llama: {tmp_path / 'trained'} has other weights than the model that this store was made with"
        ]

    def test_refusals(self, tiny_store, monkeypatch):
        with pytest.raises(SpecError, match="at least 1"):
            reextract(tiny_store, 0)
        with pytest.raises(SpecError, match="name one of these"):
            reextract(tiny_store, 1, model=["other=/x"])
        monkeypatch.setattr("featstore.extraction.reextract.has_rows", lambda *_: False)
        with pytest.raises(StoreStateError, match="leave --reextract out"):
            reextract(tiny_store, 1)

    def test_batches_are_spread_and_fixed_by_the_seed(self, tiny_store):
        plan = prepare(Settings(store=tiny_store, device="cpu", given=frozenset()), quiet=True).plan
        assert isinstance(plan, Plan)
        every = planned_batches(plan, "llama", 10**6, 0)
        assert sorted(w for batch in every for w in batch) == list(range(len(plan.corpus.window_document)))
        position = {batch.tobytes(): i for i, batch in enumerate(every)}
        chosen = [tuple(position[b.tobytes()] for b in planned_batches(plan, "llama", 4, seed)) for seed in range(9)]
        assert [tuple(position[b.tobytes()] for b in planned_batches(plan, "llama", 4, s)) for s in range(9)] == chosen
        assert len(set(chosen)) > 1
        for places in chosen:
            for quarter, place in enumerate(places):
                assert quarter * len(every) / 4 - 1 < place < (quarter + 1) * len(every) / 4


@given(seed=st.integers(0, 2**32 - 1), loud=st.floats(1, 1e3), form=st.sampled_from(sorted(FORMATS)))
def test_rounding_stays_within_its_bound(seed, loud, form):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((64, 24)).astype(np.float32) * np.exp(rng.standard_normal(24)).astype(np.float32)
    scale = column_scale_of(rows) if form == "int8" else None
    rows[:, 3] *= np.float32(loud)
    rows[::7] *= np.float32(0.01)
    encoded = FORMATS[form].encode(rows, scale)
    held = FORMATS[form].decode(encoded.stored, encoded.row_scale, scale)
    size = np.linalg.norm(held.astype(np.float64), axis=1)
    error = np.linalg.norm(held.astype(np.float64) - rows, axis=1) / size
    bound = rounding_bound(FORMATS[form], size, 24, encoded.row_scale, scale)
    # Widening and the products with the scales are float32 themselves.
    assert (error <= bound * 1.001 + 1e-6).all()
    if form != "float32" and loud < 4:
        assert np.median(error / bound) > 0.05  # and it is a bound that says something


def test_the_arithmetic_of_shorter_types_is_allowed_more():
    assert COMPUTE_TOLERANCE["float32"] < COMPUTE_TOLERANCE["float16"] < COMPUTE_TOLERANCE["bfloat16"]


class TestTheCommand:
    def test_everything_is_checked(self, tiny_store, capsys):
        told = call(capsys, "featstore", "verify", tiny_store, "--reextract", "2", "--json").json
        assert told["damage"] == told["not_checked"] == []
        assert told["tokenized"] == ["llama", "mistral"]
        assert told["reextract"]["models"]["llama"]["batches"] == 2
        said = call(capsys, "featstore", "verify", tiny_store, "--reextract", "1", "--seed", "3")
        assert said.code == 0
        assert "rows bit-identical" in said.out
        assert "no damage" in said.out

    def test_damage_of_any_kind_exits_1(self, real, capsys, tiny_mistral):
        words = ("--reextract", "1", "--model", f"llama={tiny_mistral}")
        other = call(capsys, "featstore", "verify", real, *words)
        assert other.code == 1
        assert "is not the model of this store" in other.out
        rewrite(real, "models/llama/tokens", lambda a: a["models/llama/tokens/id"].__setitem__(4, 5))
        assert call(capsys, "featstore", "verify", real, "--retokenise").code == 1
        alone = call(capsys, "featstore", "verify", real, "--json").json
        assert (alone["damage"], alone["tokenized"]) == ([], [])  # nothing in the store contradicts it
        assert alone["not_checked"][-1].endswith("give --retokenise or --reextract N")
