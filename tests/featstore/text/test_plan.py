"""The plan: budgets, groups, batches and what its hash stands for."""

from __future__ import annotations

import dataclasses
import functools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from featstore.errors import CorpusError, OffsetError, SpecError
from featstore.extraction.job import prepare
from featstore.extraction.settings import Settings
from featstore.models import loading as models
from featstore.text.documents import documents
from featstore.text.plan import Plan, PlannedCorpus, PlannedModel
from featstore.text.planning import make_plan, plan_model
from featstore.text.splits import split_of
from featstore.text.windows import windows
from tests.support.tokenizers import train_byte_level

TEXTS = [f"document {i}: " + "some more words " * (i % 5 + 1) for i in range(12)]


@functools.cache
def pieces(size: int, starts: int = 0) -> PreTrainedTokenizerFast:
    """A tokenizer with a token for every run of up to `size` characters, after `starts` special ones."""
    run = rf"[\s\S]{{1,{size}}}"
    runs = sorted({found for text in TEXTS for found in re.findall(run, text)})
    names = ["[UNK]", *(f"[{i}]" for i in range(starts)), *runs]
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(run), "isolated")
    if starts:
        first = [f"[{i}]" for i in range(starts)]
        tokenizer.add_special_tokens(first)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*first, "$A"], special_tokens=[(name, names.index(name)) for name in first]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def plan(texts=TEXTS, tokenizers=None, max_tokens=None, **options) -> Plan:
    tokenizers = tokenizers or {"a": pieces(3), "b": pieces(5, starts=1)}
    return make_plan(documents(texts), tokenizers, max_tokens=max_tokens, window_bytes=32, **options)


class TestTables:
    def test_windows_rows_and_text_fit_together(self):
        made = plan()
        text = made.corpus.text.tobytes().decode()
        assert text == "".join(TEXTS)
        np.testing.assert_array_equal(np.diff(made.corpus.document_start), [len(t) for t in TEXTS])
        expected = [
            (d, start, end) for d, t in enumerate(TEXTS) for start, end in windows(t.encode(), made.window_bytes)
        ]
        c = made.corpus
        assert list(zip(c.window_document, c.window_start, c.window_end, strict=True)) == expected
        for name, size in (("a", 3), ("b", 5)):
            model = made.models[name]
            for w, (_, start, end) in enumerate(expected):
                rows = slice(model.row_start[w], model.row_start[w + 1])
                ordinary = ~model.special[rows]
                assert ordinary.sum() == -(-(end - start) // size)
                assert model.byte_end[rows][-1] == end - start
                assert (~ordinary).sum() == (name == "b")
            assert model.rows == len(model.ids) == len(model.byte_end) == len(model.special)

    def test_ids_and_splits_are_those_of_the_documents(self):
        made = plan()
        ids = [d.id for d in documents(TEXTS)]
        assert made.corpus.document_id.tobytes() == b"".join(ids)
        np.testing.assert_array_equal(made.corpus.document_split, split_of(ids))

    def test_more_windows_than_a_tokenising_batch(self):
        texts = [f"{i} " + "x " * 400 for i in range(20)]
        made = plan(texts)
        assert len(made.corpus.window_document) > 256
        assert made.corpus.text.tobytes().decode() == "".join(texts)

    def test_progress_counts_the_model_with_most_tokens(self):
        ticks: list[float] = []
        made = plan(tick=ticks.append)
        per_window = np.maximum(*(np.diff(m.row_start) for m in made.models.values()))
        assert ticks == per_window.tolist()


class TestBudget:
    @given(st.integers(20, 400))
    def test_it_stops_before_the_first_window_that_would_exceed_it_for_any_model(self, budget):
        whole = plan()
        cumulated = np.maximum(*(m.row_start[1:] for m in whole.models.values()))
        fitting = int((cumulated <= budget).sum())
        first_documents = whole.corpus.window_document[:fitting]
        if len(set(first_documents.tolist())) < 3:
            with pytest.raises(CorpusError):
                plan(max_tokens=budget)
            return
        made = plan(max_tokens=budget)
        assert len(made.corpus.window_document) == fitting
        for name, model in made.models.items():
            np.testing.assert_array_equal(model.row_start, whole.models[name].row_start[: fitting + 1])
            np.testing.assert_array_equal(model.ids, whole.models[name].ids[: model.rows])
            assert model.rows <= budget
        if fitting < len(cumulated):
            assert cumulated[fitting] > budget

    def test_either_model_can_be_the_one_that_stops_it(self):
        for tokenizers in ({"a": pieces(1), "b": pieces(9)}, {"a": pieces(9), "b": pieces(1)}):
            made = plan(tokenizers=tokenizers, max_tokens=200)
            assert 150 < max(m.rows for m in made.models.values()) <= 200

    def test_the_last_document_is_cut_where_the_budget_ended(self):
        made = plan(max_tokens=150)
        c = made.corpus
        assert c.document_start[-1] == len(c.text)
        last = c.window_document[-1]
        assert c.window_end[-1] == c.document_start[last + 1] - c.document_start[last]
        assert "".join(TEXTS).startswith(c.text.tobytes().decode())
        assert len(c.text) < len("".join(TEXTS))

    @pytest.mark.parametrize(
        ("texts", "budget", "message"),
        [
            (TEXTS, 3, "the first window exceeds --max-tokens"),
            ([], None, "the corpus holds no text"),
            (["", " \n"], None, "the corpus holds no text"),
            (["a"], None, "shorter than two tokens"),
            (TEXTS[:2], None, "2 different document"),
            (TEXTS, 15, "1 different document"),
        ],
    )
    def test_too_little_text_says_why(self, texts, budget, message):
        with pytest.raises(CorpusError, match=message):
            plan(texts, max_tokens=budget)

    def test_a_character_that_cannot_be_spelt_is_named_with_document_and_model(self, sample_texts):
        drops = train_byte_level(sample_texts, dropped="\x13")
        read = ["one text", "two texts", "three \x13 texts", "four texts"]
        with pytest.raises(OffsetError, match=r"^document 3, as model 'b' reads it: no token covers character 6 "):
            plan(read, {"a": pieces(3), "b": drops})
        planned = plan(read, {"a": pieces(3)}).corpus
        with pytest.raises(OffsetError, match=r"^document 3, as model 'c' reads it: no token covers character 6 "):
            plan_model(planned, drops, "c", 100)

    def test_a_window_longer_than_a_context_is_refused(self):
        plan(contexts={"a": 11, "b": 8})
        with pytest.raises(SpecError, match=r"more than the context of model 'a' \(10\); use a smaller --window-bytes"):
            plan(contexts={"a": 10, "b": 8})

    @pytest.mark.parametrize("options", [{"batch_tokens": 0}, {"shard_rows": 0}])
    def test_sizes_must_be_positive(self, options):
        with pytest.raises(SpecError, match="both must be positive"):
            plan(**options)


def planned(lengths: list[int], batch_tokens: int, shard_rows: int) -> Plan:
    """A plan that holds only what batching looks at."""
    none = np.zeros(0, np.int64)
    text = PlannedCorpus(*[none] * 7)
    model = PlannedModel(np.concatenate(([0], np.cumsum(lengths))).astype(np.int64), none, none, none, none, none)
    return Plan(text, {"m": model}, 32, batch_tokens, shard_rows, {})


LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=60)


class TestBatches:
    @given(LENGTHS, st.integers(1, 120))
    def test_groups_tile_the_windows_and_hold_about_a_shard(self, lengths, shard_rows):
        groups = list(planned(lengths, 64, shard_rows).groups("m"))
        assert [first for first, _ in groups] == [0, *(end for _, end in groups)][:-1]
        assert groups[-1][1] == len(lengths)
        for first, end in groups:
            assert sum(lengths[first:end]) <= shard_rows or end == first + 1
            if end < len(lengths):  # as large as it may be
                assert sum(lengths[first : end + 1]) > shard_rows

    @given(LENGTHS, st.integers(1, 200))
    def test_batches_hold_every_window_once_within_the_budget(self, lengths, batch_tokens):
        batches = planned(lengths, batch_tokens, 10**6).batches("m", 0, len(lengths))
        assert sorted(w for batch in batches for w in batch.tolist()) == list(range(len(lengths)))
        for batch in batches:
            padded = len(batch) * max(lengths[w] for w in batch)
            assert padded <= batch_tokens or len(batch) == 1

    @given(LENGTHS, st.integers(1, 200), st.data())
    def test_a_group_in_the_middle_gives_its_own_windows(self, lengths, batch_tokens, data):
        first = data.draw(st.integers(0, len(lengths) - 1))
        end = data.draw(st.integers(first + 1, len(lengths)))
        batches = planned(lengths, batch_tokens, 10**6).batches("m", first, end)
        assert sorted(w for batch in batches for w in batch.tolist()) == list(range(first, end))

    def test_lengths_in_a_batch_are_neighbours(self):
        rng = np.random.default_rng(0)
        lengths = rng.integers(1, 100, 200).tolist()
        batches = planned(lengths, 800, 10**6).batches("m", 0, 200)
        sizes = [lengths[w] for batch in batches for w in batch]
        assert sizes == sorted(sizes, reverse=True)
        padded = sum(len(batch) * max(lengths[w] for w in batch) for batch in batches)
        assert padded < 1.15 * sum(lengths)

    def test_they_are_the_same_every_time(self):
        made = planned([5, 9, 5, 9, 1] * 20, 40, 100)
        once = [b.tolist() for g in made.groups("m") for b in made.batches("m", *g)]
        assert once == [b.tolist() for g in made.groups("m") for b in made.batches("m", *g)]


class TestHash:
    def test_it_is_a_function_of_text_and_windows(self):
        base = plan().hash
        assert base == plan().hash == plan(batch_tokens=7, shard_rows=9, settings={"seed": 1}).hash
        changed = {
            "text": plan([t.replace("some", "same") for t in TEXTS]).hash,
            "order": plan(TEXTS[::-1]).hash,
            "budget": plan(max_tokens=150).hash,
            "windows": make_plan(
                documents(TEXTS), {"a": pieces(3), "b": pieces(5, starts=1)}, max_tokens=None, window_bytes=31
            ).hash,
        }
        assert base not in changed.values()
        assert len(set(changed.values())) == len(changed)
        # Whose tokens they are is another hash: a model that joins a store leaves its plan as it was.
        assert plan(tokenizers={"a": pieces(4), "c": pieces(5)}).hash == base

    def test_a_models_hash_is_a_function_of_its_tokens(self):
        base = plan().models["b"].hash
        assert base == plan(batch_tokens=7).models["b"].hash
        changed = {
            plan(tokenizers={"a": pieces(3), "b": pieces(4, starts=1)}).models["b"].hash,
            plan(tokenizers={"a": pieces(3), "b": pieces(5)}).models["b"].hash,
            plan(max_tokens=150).models["b"].hash,
        }
        assert len(changed - {base}) == 3

    def test_the_boundary_between_documents_counts(self):
        texts = ["abc def ghi", "jkl", "mno", "pqr"]
        moved = ["abc def ", "ghijkl", "mno", "pqr"]
        assert plan(texts).corpus.text.tobytes() == plan(moved).corpus.text.tobytes()
        assert plan(texts).hash != plan(moved).hash

    def test_where_and_how_it_runs_does_not_count(self, tiny_llama, tiny_mistral, short_corpus, tmp_path, monkeypatch):
        monkeypatch.setattr(models, "inspect_model", functools.cache(models.inspect_model))  # a tokenizer loads slowly
        settings = Settings(
            model=(f"a={tiny_llama}", f"b={tiny_mistral}"),
            layers=("0",),
            dataset=f"jsonl:{short_corpus}",
            store=tmp_path / "x.zarr",
            max_tokens=2000,
            window_bytes=256,
        )
        base = prepare(settings, quiet=True).plan.hash
        for change in (
            {"device": "cpu", "dtype": "bfloat16", "attention": "eager"},
            {"layers": ("1,2",), "store": tmp_path / "y.zarr", "form": "float32", "layout": "archive"},
            {"batch_tokens": 100, "shard_rows": 1024, "sink_threshold": 9.0},
        ):
            assert prepare(dataclasses.replace(settings, **change), quiet=True).plan.hash == base
        for change in (
            {"max_tokens": 1500},
            {"window_bytes": 200},
            {"seed": 1},
            {"max_documents": 3},
            {"max_document_bytes": 300},
        ):
            assert prepare(dataclasses.replace(settings, **change), quiet=True).plan.hash != base
        assert not list(tmp_path.iterdir())
