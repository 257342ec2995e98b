"""Benchmarks that are too long to run keep working: their parts on small shapes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.thorough


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])


def test_wide_models_keep_the_published_proportions() -> None:
    import _wide

    full, small = (_wide.configuration("llama", _wide.Wide(width=width)) for width in (4096, 256))
    assert (full.num_attention_heads, full.num_key_value_heads, full.intermediate_size) == (32, 8, 14336)
    assert full.rope_parameters["rope_type"] == "llama3"
    assert small.hidden_size // small.num_attention_heads == 128
    weights = _wide.random_weights(small)
    assert weights["model.embed_tokens.weight"].shape == (128256, 256)
    assert "lm_head.weight" not in weights


def test_every_job_is_a_command_of_both_builds() -> None:
    import _wide
    import bench_wide

    jobs: dict[str, Any] = bench_wide.jobs(_wide.Wide(), 512)
    assert {
        "procrustes",
        "affine",
        "linear",
        "reduced-rank",
        "lora",
        "mlp",
        "compress",
        "cka",
        "moments",
    } <= jobs.keys()
    assert set(bench_wide.QUICK.split(",")) <= jobs.keys()
    assert all(job.commands.keys() == {"this", "former"} for job in jobs.values())


def test_what_moments_take_and_do_to_figures(tmp_path: Path) -> None:
    import bench_moments

    found = bench_moments.measure("flat", 128, 1, tmp_path)
    assert 2 < found["bytes_an_element"] < 3.3
    assert max(found["difference"].values()) < 1e-6
