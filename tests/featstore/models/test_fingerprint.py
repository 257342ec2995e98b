"""The fingerprint of weights: every byte counts, nothing else does, and it is remembered no longer than it is true."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from featstore.errors import (
    WeightsError,
)
from featstore.models.fingerprint import SCHEME, Weights
from featstore.models.loading import load_model, weight_bytes
from featstore.models.references import ModelSpec
from featstore.models.weights import weights_fingerprint, weights_of
from featstore.runtime.caches import cache_directory
from featstore.runtime.provenance import canonical_json
from tests.support.checkpoints import WEIGHTS, edit, silence_a_head, spec_of


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, where it can see what was kept."""
    monkeypatch.setenv("FEATSTORE_CACHE", str(tmp_path / "caches"))
    return tmp_path / "caches" / "fingerprints"


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama, to be changed."""
    return shutil.copytree(tiny_llama, tmp_path / "model")


class TestFingerprint:
    def test_it_is_the_hash_of_names_dtypes_shapes_and_bytes(self, model: Path, caches: Path) -> None:
        """Computed again through the safetensors library, tensor by tensor."""
        entries = []
        with safe_open(model / WEIGHTS, "np") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                array = file.get_tensor(name)
                assert array.dtype == np.float32
                entries.append([name, "F32", list(array.shape), blake3(array.tobytes()).hexdigest()])
        expected = blake3(canonical_json({"tensors": sorted(entries), "files": []}).encode()).hexdigest()
        assert weights_fingerprint(spec_of(model)) == f"blake3:{expected}"

    def test_any_byte_makes_another_model(self, model: Path, caches: Path) -> None:
        file = model / WEIGHTS
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        found = {weights_fingerprint(spec_of(model))}
        places = [start, start + 1, (start + len(data)) // 2, len(data) - 1]
        for place in places:
            changed = bytearray(data)
            changed[place] ^= 1
            file.write_bytes(changed)
            found.add(weights_fingerprint(spec_of(model)))
        assert len(found) == len(places) + 1

    def test_an_edited_head_is_seen_where_a_sample_sees_nothing(self, model: Path, tiny_llama: Path) -> None:
        edit(model, silence_a_head)
        before, after = (
            weights_of(spec_of(path), load_model(spec_of(path), device="cpu")) for path in (tiny_llama, model)
        )
        assert before.sample == after.sample
        assert before.whole != after.whole
        assert before.differ(after)

    def test_names_dtypes_and_shapes_count(self, model: Path, caches: Path) -> None:
        def renamed(tensors):
            tensors["other"] = tensors.pop("model.norm.weight")

        def reshaped(tensors):
            tensors["model.norm.weight"] = tensors["model.norm.weight"][None].contiguous()

        def retyped(tensors):
            tensors["model.norm.weight"] = tensors["model.norm.weight"].view(torch.int32)

        original = (model / WEIGHTS).read_bytes()
        found = {weights_fingerprint(spec_of(model))}
        for change in (renamed, reshaped, retyped):
            found.add(weights_fingerprint(spec_of(edit(model, change))))
            (model / WEIGHTS).write_bytes(original)
        assert len(found) == 4

    def test_shards_and_header_do_not_count(self, model: Path, tmp_path: Path) -> None:
        whole = weights_fingerprint(spec_of(model))
        tensors = load_file(model / WEIGHTS)
        names = sorted(tensors)
        shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
        (model / WEIGHTS).unlink()
        for file, own in shards.items():
            save_file({name: tensors[name] for name in own}, model / file, metadata={"format": "pt", "more": file})
        index = {"metadata": {}, "weight_map": {name: file for file, own in shards.items() for name in own}}
        (model / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
        # What no index names is not loaded, and is none of the weights.
        save_file({"x": torch.ones(3)}, model / "consolidated.safetensors")
        assert weights_fingerprint(spec_of(model)) == whole
        assert load_model(spec_of(model), device="cpu") is not None
        (model / "two.safetensors").unlink()
        assert weights_fingerprint(spec_of(model)) is None
        assert weight_bytes(spec_of(model)) is None

    @pytest.mark.parametrize("name", ["m.gguf", "pytorch_model.bin"])
    def test_of_other_formats_the_whole_file_counts(self, name: str, tmp_path: Path, caches: Path) -> None:
        file = tmp_path / name
        spec = spec_of(file if name.endswith("gguf") else tmp_path)
        found = set()
        for content in (b"abc", b"abd", b"abc" + bytes(9)):
            file.write_bytes(content)
            found.add(weights_fingerprint(spec))
        assert len(found) == 3
        assert all(value.startswith(SCHEME) for value in found)

    def test_a_model_of_the_hub_is_read_from_its_snapshot(
        self, tiny_llama: Path, tmp_path: Path, caches: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        spec = ModelSpec("m", "owner/model")
        assert weights_fingerprint(spec) is None
        snapshot = tmp_path / "hub" / "models--owner--model" / "snapshots" / ("0" * 40)
        (snapshot.parents[1] / "refs").mkdir(parents=True)
        (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
        shutil.copytree(tiny_llama, snapshot)
        assert weights_fingerprint(spec) == weights_fingerprint(spec_of(tiny_llama))
        assert weights_fingerprint(ModelSpec("m", "owner/model", "v2")) is None

    @pytest.mark.parametrize("keep", [4, 200, -10])
    def test_a_file_that_is_cut_short_is_named(self, model: Path, keep: int) -> None:
        file = model / WEIGHTS
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(WeightsError, match=r"model\.safetensors is .*; download or save it again"):
            weights_fingerprint(spec_of(model))


class TestCache:
    def kept(self, caches: Path) -> tuple[Path, dict[str, Any]]:
        [file] = caches.iterdir()
        return file, json.loads(file.read_text())

    def plant(self, caches: Path) -> str:
        """Put a false hash where the true one was kept."""
        file, entry = self.kept(caches)
        false = SCHEME + "f" * 64
        file.write_text(json.dumps(entry | {"fingerprint": false}))
        return false

    def test_files_that_have_not_changed_are_not_read_again(self, model: Path, caches: Path) -> None:
        true = weights_fingerprint(spec_of(model))
        assert weights_fingerprint(spec_of(model)) == true
        false = self.plant(caches)
        assert weights_fingerprint(spec_of(model)) == false
        assert weights_fingerprint(spec_of(model), fresh=True) == true
        # What was hashed afresh is kept in its place.
        assert weights_fingerprint(spec_of(model)) == true

    def test_an_edit_that_keeps_size_and_time_is_noticed(self, model: Path, caches: Path) -> None:
        before, stat = weights_fingerprint(spec_of(model)), (model / WEIGHTS).stat()
        with (model / WEIGHTS).open("r+b") as stream:
            stream.seek(-4, os.SEEK_END)
            stream.write(b"1234")
        os.utime(model / WEIGHTS, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert (model / WEIGHTS).stat().st_mtime_ns == stat.st_mtime_ns
        assert weights_fingerprint(spec_of(model)) != before
        assert len(list(caches.iterdir())) == 1

    @pytest.mark.parametrize("damage", ["", "[]", "{}", '{"state": 1, "fingerprint": 2}'])
    def test_a_damaged_cache_is_made_again(self, model: Path, caches: Path, damage: str) -> None:
        true = weights_fingerprint(spec_of(model))
        file, entry = self.kept(caches)
        file.write_text(damage)
        assert weights_fingerprint(spec_of(model)) == true
        assert json.loads(file.read_text()) == entry

    def test_a_cache_that_cannot_be_written_is_no_error(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("not a directory")
        true = weights_fingerprint(spec_of(model))
        monkeypatch.setenv("FEATSTORE_CACHE", str(tmp_path / "file" / "caches"))
        assert weights_fingerprint(spec_of(model)) == true

    def test_where_it_lies(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FEATSTORE_CACHE", "/a")
        monkeypatch.setenv("XDG_CACHE_HOME", "/b")
        monkeypatch.setenv("HOME", "/c")
        assert cache_directory() == Path("/a")
        monkeypatch.delenv("FEATSTORE_CACHE")
        assert cache_directory() == Path("/b/featstore")
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert cache_directory() == Path("/c/.cache/featstore")

    def test_what_is_large_shows_progress_unless_quiet(
        self, model: Path, caches: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from featstore.models import fingerprint

        shown: list[tuple[str, float, bool]] = []
        progress = fingerprint.progress

        def noted(label, total, unit, *, quiet):
            shown.append((f"{label} {unit}", total, quiet))
            return progress(label, total, unit, quiet=True)

        monkeypatch.setattr(fingerprint, "progress", noted)
        size = (model / WEIGHTS).stat().st_size / 1e9
        weights_fingerprint(spec_of(model), fresh=True)
        monkeypatch.setattr(fingerprint, "_LARGE", 10)
        weights_fingerprint(spec_of(model), fresh=True)
        weights_fingerprint(spec_of(model), fresh=True, quiet=True)
        assert shown == [
            ("fingerprint m GB", size, True),
            ("fingerprint m GB", size, False),
            ("fingerprint m GB", size, True),
        ]


class TestRecorded:
    def test_what_stores_recorded_before_is_a_sample(self) -> None:
        old = Weights.recorded({"weights_fingerprint": "a" * 64})
        assert old == Weights(None, "a" * 64)
        assert (
            Weights.recorded({}) == Weights.recorded({"weights_fingerprint": None, "weights_sample": None}) == Weights()
        )
        new = Weights(f"{SCHEME}1", "b" * 64)
        assert Weights.recorded(new.to_dict()) == new
        assert old.differ(new)
        assert not old.differ(Weights(f"{SCHEME}1", "a" * 64))
        assert old.same(Weights(f"{SCHEME}1", "a" * 64))

    def test_whole_files_decide_where_both_are_known(self) -> None:
        one = Weights(f"{SCHEME}1", "a")
        assert not one.differ(Weights(f"{SCHEME}1", "b"))
        assert one.differ(Weights(f"{SCHEME}2", "a"))
        assert one.same(Weights(f"{SCHEME}1", "b"))
        assert not one.differ(Weights())
        assert not one.same(Weights())
        assert one.differ(Weights(None, "b"))
