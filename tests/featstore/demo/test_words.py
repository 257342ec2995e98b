"""The demo's words: every sentence follows from the figures, and a figure that is absent is a dash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from featstore.demo.blocks import APART, PLANTED, Block, DemoResult, read_block
from featstore.demo.words import describe, sentences
from featstore.errors import CorruptDataError
from featstore.runtime.records import read, write

KEY, DEEP = "a:8->b:2", "a:16->b:4"


def block(
    *, partial=0.2, partial_ci95=(0.1, 0.3), token=0.6, cka=0.5, p=(0.025, 0.025), nats=(0.4, (0.2, 0.6))
) -> Block:
    floors = {
        name: {"value": cka, "mean": 0.1, "p95": 0.15, "p": each}
        for name, each in zip(("documents", "token"), p, strict=True)
    }
    figures = {"r2": 0.7, "token_r2": token, "partial_r2": partial, "partial_r2_ci95": partial_ci95}
    figures["beyond_token"] = {"nats": nats[0], "ci95": nats[1]}
    figures["recovered"] = {"value": 0.8, "ci95": (0.7, 0.9)}
    return Block.parse(
        {
            "source": "a",
            "target": "b",
            "cka": {KEY: {"value": cka, "floors": floors}},
            "maps": {"affine": {KEY: figures}},
        }
    )


def said(**figures: Any) -> str:
    return " ".join(sentences(block(**figures)))


class TestSentences:
    def test_what_is_beyond_the_token(self):
        text = said()
        assert "R2 0.700, the current token alone 0.600" in text
        assert "the map predicts 20.0% of what the token leaves [10.0%, 30.0%]" in text
        assert "it leaves 0.40 [0.20, 0.60] nats/token less loss than the token alone;" in text
        assert "of what the mean state costs it recovers 80.0% [70.0%, 90.0%]." in text

    def test_what_cannot_be_told_is_not_claimed(self):
        text = said(partial=0.02, partial_ci95=(-0.05, 0.09), nats=(0.1, (-0.2, 0.4)))
        assert "the map cannot be told from the token (2.0% of what the token leaves [-5.0%, 9.0%])" in text
        assert "it cannot be told from the token alone (0.10 [-0.20, 0.40] nats/token)" in text
        assert "predicts" not in text

    def test_what_is_worse_is_called_worse(self):
        text = said(partial=-0.3, partial_ci95=(-0.5, -0.1), nats=(-0.4, (-0.6, -0.2)))
        assert "the map does worse than the token (" in text
        assert "it does worse than the token alone (" in text
        assert "predicts" not in text

    @pytest.mark.parametrize("interval", [None, (None, None)])
    def test_without_an_interval_nothing_is_decided(self, interval):
        text = said(partial_ci95=interval, nats=(0.4, interval))
        assert text.count("without an interval that could decide") == 2

    @pytest.mark.parametrize(("p", "more"), [(0.025, True), (0.05, True), (0.075, False), (1.0, False)])
    def test_cka_is_held_against_its_floors(self, p, more):
        text = said(p=(p, 0.5))
        assert ("0.500: more than the same documents" in text) == more
        assert ("0.500: not demonstrably more than the same documents" in text) != more
        assert "not demonstrably more than those partners" in text

    def test_the_quoted_pair_is_the_middle_one_whatever_the_figures_are(self):
        best_elsewhere = {"r2": 0.99, "token_r2": 0.1, "partial_r2": 0.9, "partial_r2_ci95": (0.8, 1.0)}
        quoted = {"r2": 0.7, "token_r2": 0.6, "partial_r2": 0.2, "partial_r2_ci95": (0.1, 0.3)}
        maps = {"lora": {KEY: best_elsewhere}}
        maps["affine"] = {
            "a:16->b:4": best_elsewhere,
            "b:2->a:8": best_elsewhere,
            "a:0->b:0": best_elsewhere,
            KEY: quoted,
        }
        [text] = sentences(Block.parse({"source": "a", "target": "b", "maps": maps}))
        assert KEY in text
        assert "R2 0.700" in text

    def test_an_absent_figure_makes_no_sentence(self):
        old = Block.parse({"source": "a", "target": "b", "maps": {"affine": {KEY: {"r2": 0.7}}}, "cka": {KEY: {}}})
        assert list(sentences(old)) == []


class TestTable:
    def test_absent_figures_are_dashes(self):
        old = Block.parse(
            {
                "source": "a",
                "target": "b",
                "cka": {KEY: {"value": 0.5}},
                "maps": {"affine": {KEY: {"r2": 0.7, "nats_per_token": {"clean": 3.0, "mapped": None, "mean": 9.0}}}},
            }
        )
        lines = describe(
            DemoResult.parse({"blocks": {PLANTED: old}, "report": "r.html", "total_seconds": 3})
        ).splitlines()
        assert lines[2].split() == ["cka", KEY, "0.500", "-", "-"]
        assert lines[4].split() == ["affine", KEY, "0.700", "-", "-", "3.00", "-", "-", "9.00", "-", "-", "-"]
        assert lines[-1].endswith("open r.html")

    def test_blocks_and_layers_stand_in_their_order_also_when_read_back(self, tmp_path):
        figures = {DEEP: {"r2": 0.1}, KEY: {"r2": 0.2}}
        content = {"source": "a", "target": "b", "maps": {"affine": figures}}
        result = DemoResult.parse({"blocks": {APART: content, PLANTED: content}, "report": "r.html"})
        again = read(DemoResult, write(result, tmp_path))
        for each in (result, again):
            text = describe(each)
            assert text.index("PLANTED") < text.index("TRAINED APART")
            assert text.index(KEY) < text.index(DEEP)


class TestReading:
    @pytest.fixture
    def written(self, tmp_path) -> Path:
        """The files of a run and of a comparison, as the commands write them."""
        pairs = {
            KEY: {
                "test": {"r2": 0.7, "partial_r2": 0.2, "partial_r2_ci95": [0.1, 0.3]},
                "baselines": {"token": {"r2": 0.6}},
            }
        }
        pairs[DEEP] = {"test": {"r2": 0.5}, "baselines": {"mean": {"r2": 0.0}}}
        (tmp_path / "metrics.json").write_text(json.dumps({"pairs": pairs}))
        share = {"value": 0.4, "ci95": [0.2, 0.6], "reason": None}
        conditions = {"clean": {"nats_per_token": 3.0}, "raw": None}
        beyond = {"nats": 0.5, "ci95": [0.1, 0.9], "p": 0.01, "beaten": True}
        entry = {"conditions": conditions, "recovered": share, "recovered_token": share, "beyond_token": beyond}
        (tmp_path / "stitch.json").write_text(json.dumps({"pairs": {KEY: entry}}))
        floor = {
            "value": [[0.4, 0], [0, 0.3]],
            "mean": [[0.1, 0], [0, 0.2]],
            "p95": [[0.2, 0], [0, 0.3]],
            "p": [[0.025, 1], [1, 0.5]],
        }
        similarity = {"models": ["a", "b"], "layers": {"a": [8, 16], "b": [2, 4]}, "cross": [[0.5, 0], [0, 0.6]]}
        similarity["permutations"] = {"documents": floor}
        (tmp_path / "cka.json").write_text(json.dumps(similarity))
        return tmp_path

    def test_figures_come_from_their_members(self, written):
        found = read_block("a", "b", written, {"affine": written})
        figures = found.maps["affine"][KEY]
        assert (figures.r2, figures.token_r2, figures.partial_r2, figures.partial_r2_ci95) == (
            0.7,
            0.6,
            0.2,
            (0.1, 0.3),
        )
        assert dict(figures.nats_per_token) == {"clean": 3.0, "raw": None}
        assert figures.recovered_token is not None
        assert (figures.recovered_token.value, figures.recovered_token.ci95) == (0.4, (0.2, 0.6))
        assert figures.beyond_token is not None
        assert (figures.beyond_token.nats, figures.beyond_token.beaten) == (0.5, True)
        deep = found.maps["affine"][DEEP]
        assert (deep.r2, deep.token_r2, deep.partial_r2, deep.recovered_token) == (0.5, None, None, None)
        assert [found.cka[key].value for key in (KEY, DEEP)] == [0.5, 0.6]
        assert [found.cka[key].floors["documents"].p for key in (KEY, DEEP)] == [0.025, 0.5]

    def test_a_value_of_another_type_is_told(self, written):
        (written / "metrics.json").write_text(json.dumps({"pairs": {KEY: {"test": {"r2": "high"}, "baselines": {}}}}))
        with pytest.raises(CorruptDataError, match="r2"):
            read_block("a", "b", written, {"affine": written})
