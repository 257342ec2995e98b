"""Tokenizers mean what their files say: quoted control tokens, the file against the class, start tokens asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer

from featstore import open_store
from featstore.errors import SpecError, StoreStateError
from featstore.extraction.job import prepare
from featstore.extraction.run import extract
from featstore.extraction.settings import Settings
from featstore.models.loading import inspect_model
from featstore.models.references import ModelSpec
from tests.support.commands import call


def spec(path: Path) -> ModelSpec:
    return ModelSpec("m", str(path))


def configured(source: Path, folder: Path, **changes: Any) -> Path:
    """A folder with another tokenizer_config.json."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


class TestControlTokens:
    def test_quoted_ones_are_text_unless_asked_for(self, tiny_mistral: Path) -> None:
        text, special = (inspect_model(spec(tiny_mistral), way) for way in ("text", "special"))
        assert (text.tokenizer.split_special_tokens, special.tokenizer.split_special_tokens) == (True, False)
        assert text.tokenizer_hash == special.tokenizer_hash
        quoted = "say </s> and <s> and <unk>"
        assert text.tokenizer(quoted)["input_ids"].count(1) == 1
        assert not {0, 2} & set(text.tokenizer(quoted)["input_ids"])
        assert {0, 1, 2} <= set(special.tokenizer(quoted)["input_ids"][1:])
        assert inspect_model(spec(tiny_mistral)).tokenizer.split_special_tokens

    def test_a_text_that_begins_with_the_start_token_gets_one(self, tiny_mistral: Path) -> None:
        ids = inspect_model(spec(tiny_mistral)).tokenizer("<s>Hello")["input_ids"]
        assert ids[0] == 1
        assert 1 not in ids[1:]

    def test_added_tokens_that_are_not_special_stay_whole(self, tiny_llama: Path, tmp_path: Path) -> None:
        folder = configured(tiny_llama, tmp_path / "m")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens([AddedToken("<think>", special=False)])
        tokenizer.save_pretrained(folder)
        read = inspect_model(spec(folder)).tokenizer("a<think>b <|im_end|>")
        assert read["input_ids"].count(tokenizer.convert_tokens_to_ids("<think>")) == 1
        assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in read["input_ids"]

    def test_another_word_is_refused(self, tiny_llama: Path) -> None:
        with pytest.raises(SpecError, match="--control-tokens 'none': choose text or special"):
            inspect_model(spec(tiny_llama), "none")


class TestTheFileAgainstTheClass:
    def test_the_normaliser_of_the_file_is_followed(self, tiny_mistral: Path, tmp_path: Path) -> None:
        folder = configured(tiny_mistral, tmp_path / "m", tokenizer_class="LlamaTokenizer")
        AutoConfig.for_model("llama").save_pretrained(folder)
        meant = Tokenizer.from_file(str(folder / "tokenizer.json"))
        meant.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        meant.pre_tokenizer = None
        meant.save(str(folder / "tokenizer.json"))
        info = inspect_model(spec(folder))
        for text in (" The", "The", "  two", "\n a", "▁x"):
            assert info.tokenizer(text)["input_ids"] == meant.encode(text).ids, text
        assert AutoTokenizer.from_pretrained(folder)(" The")["input_ids"] != meant.encode(" The").ids

    def test_the_cuts_of_the_file_are_followed(self, tiny_llama: Path, tmp_path: Path) -> None:
        folder = configured(tiny_llama, tmp_path / "m", tokenizer_class="GPT2Tokenizer")
        meant = Tokenizer.from_file(str(folder / "tokenizer.json"))
        meant.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split("e", "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        meant.save(str(folder / "tokenizer.json"))
        text = "The capital of the French Republic"
        assert inspect_model(spec(folder)).tokenizer(text)["input_ids"] == meant.encode(text).ids
        assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] != meant.encode(text).ids

    @pytest.mark.parametrize("model", ["tiny_llama", "tiny_mistral"])
    def test_where_the_class_does_what_the_file_says_the_hash_stays(
        self, model: str, request: pytest.FixtureRequest
    ) -> None:
        from featstore.runtime.provenance import digest

        folder = request.getfixturevalue(model)
        loaded = AutoTokenizer.from_pretrained(folder)
        definition = [loaded.backend_tokenizer.to_str(), loaded.special_tokens_map]
        assert inspect_model(spec(folder)).tokenizer_hash == digest(definition)


class TestStartTokens:
    def test_what_is_there_is_found_by_tokenising(self, tiny_llama: Path, tiny_mistral: Path) -> None:
        with_one, without = inspect_model(spec(tiny_mistral)), inspect_model(spec(tiny_llama))
        assert (with_one.start_token, without.start_token) == ({"id": 1, "text": "<s>"}, None)
        # Both configurations name a start token; that alone asks for none.
        assert without.tokenizer.bos_token == "<|im_start|>"
        assert without.start_token_asked is None
        assert without.describe()["start_token"] is None
        assert "start_token_asked" not in without.describe()

    def test_one_that_is_asked_for_and_not_added_is_said_aloud(
        self, tiny_llama: Path, short_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = configured(tiny_llama, tmp_path / "m", add_bos_token=True)
        said = (
            "model 'm': its tokenizer_config.json asks for the start token '<|im_start|>' (add_bos_token), but the "
            "tokenizer as loaded puts none before a text"
        )
        words = ("--layers", 1, "--dataset", f"jsonl:{short_corpus}", "--max-tokens", 900, "--device", "cpu")
        done = call(capsys, "featstore", "extract", "--model", f"m={folder}", "--store", tmp_path / "s", *words)
        assert done.code == 0
        assert [line for line in done.err.splitlines() if line.startswith(said)]
        attributes = open_store(tmp_path / "s").model("m").attributes
        assert (attributes["start_token"], attributes["start_token_asked"]) == (None, "<|im_start|>")
        done = call(capsys, "featstore", "doctor", "--quick", "--model", f"m={folder}", "--store", tmp_path / "t")
        assert ", no start token, byte ends from its tokens' bytes; " in done.out
        assert said in done.out
        done = call(capsys, "featstore", "info", tmp_path / "s")
        assert "no start token: the first token of each window is masked" in done.out

    def test_nothing_is_said_where_it_is_added(
        self, tiny_mistral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = configured(tiny_mistral, tmp_path / "m", add_bos_token=True)
        assert inspect_model(spec(folder)).start_token_asked == "<s>"
        done = call(capsys, "featstore", "doctor", "--quick", "--model", f"m={folder}", "--store", tmp_path / "t")
        assert ", start token <s>, byte ends from its tokens' bytes; " in done.out
        assert "asks for" not in done.out


class TestStores:
    @pytest.fixture
    def asked(self, tiny_mistral: Path, tmp_path: Path) -> Settings:
        for i in range(4):
            (tmp_path / f"{i}.txt").write_text(f"<s>Log {i} said </s> and then <unk> again.\n" * 4)
        return Settings(
            model=(f"m={tiny_mistral}",),
            layers=("1",),
            dataset=f"text:{tmp_path}/*.txt",
            store=tmp_path / "s.zarr",
            device="cpu",
        )

    def test_the_choice_is_recorded_and_inherited(self, asked: Settings) -> None:
        extract(prepare(asked, quiet=True), quiet=True)
        store = open_store(asked.store)
        assert store.attributes["corpus"]["control_tokens"] == "text"
        tokens = store.tokens("m")
        assert set(tokens.id[~tokens.special]).isdisjoint({0, 1, 2})
        more = Settings(store=asked.store, layers=("2",), device="cpu", given=frozenset({"layers"}))
        extract(prepare(more, quiet=True), quiet=True)
        assert open_store(asked.store).model("m").layers == (1, 2)
        other = Settings(store=asked.store, device="cpu", control_tokens="special", given=frozenset({"control_tokens"}))
        with pytest.raises(StoreStateError, match="made with --control-tokens text; leave the flag out"):
            prepare(other, quiet=True)

    def test_a_store_made_before_there_was_a_choice_keeps_them(self, asked: Settings) -> None:
        from dataclasses import replace

        from featstore.extraction.reextract import check_tokens
        from featstore.store.write.writer import StoreWriter, adding_to

        extract(prepare(replace(asked, control_tokens="special"), quiet=True), quiet=True)
        with adding_to(asked.store) as writer:
            attributes = writer.attributes() or {}
            attributes["featstore"]["corpus"].pop("control_tokens")
            writer.seal(attributes)
        assert StoreWriter(asked.store).attributes()["featstore"]["corpus"].get("control_tokens") is None
        assert {1, 2} <= set(open_store(asked.store).tokens("m").id)
        assert check_tokens(open_store(asked.store), quiet=True)["damage"] == []
        more = Settings(store=asked.store, layers=("2",), device="cpu", given=frozenset({"layers"}))
        job = prepare(more, quiet=True)
        assert not job.infos["m"].tokenizer.split_special_tokens
        extract(job, quiet=True)
        assert open_store(asked.store).attributes["corpus"]["control_tokens"] == "special"

    def test_a_wrong_word_is_refused(self, asked: Settings, capsys: pytest.CaptureFixture[str]) -> None:
        done = call(capsys, "featstore", "extract", "--control-tokens", "keep", "--store", asked.store)
        assert (done.code, "--control-tokens 'keep': choose text or special" in done.err) == (2, True)
