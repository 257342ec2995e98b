"""Conversations from a file to pairs: two models with templates of their own, and what is known of them afterwards."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import featstore
from featstore import open_store
from featstore.errors import CorpusError, SpecError, StoreStateError
from featstore.extraction.job import prepare
from featstore.extraction.reextract import check_tokens
from featstore.extraction.run import extract
from featstore.extraction.settings import Settings
from featstore.models import loading as models
from featstore.models import references as spec
from featstore.store.inspect import verify
from featstore.store.inspect.verify import verify_store
from featstore.store.read.contents import corpus_problems
from featstore.text.chat import DATE
from featstore.text.chat_tokens import tokenize_conversations
from featstore.text.conversation import parse_conversation
from featstore.text.message_arrays import conversation_of
from featstore.text.roles import ROLES
from tests.support.chats import CHATML, CHATS, TRIMMING, say
from tests.support.chats_read import as_it_is, read_by, stripped
from tests.support.commands import call

#: More of them, so that every split has some.
ROWS = [
    *CHATS.values(),
    *({"messages": [say("user", f"How much is {i} times {i}?"), say("assistant", f"{i * i}.")]} for i in range(12)),
]


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"jsonl:{path}"


def chatting(model: Path, template: str, directory: Path) -> Path:
    shutil.copytree(model, directory)
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def chats(tiny_llama, tiny_mistral, tmp_path_factory) -> dict[str, Path]:
    """Both tiny models with a template, and a third one that joins later."""
    root = tmp_path_factory.mktemp("chats")
    return {
        "llama": chatting(tiny_llama, CHATML, root / "llama"),
        "mistral": chatting(tiny_mistral, TRIMMING, root / "mistral"),
        "late": chatting(
            tiny_mistral, CHATML.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>"), root / "late"
        ),
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("rows") / "chats.jsonl", ROWS)


def settings(store: Path, chats, corpus: str, names=("llama", "mistral"), **more) -> Settings:
    given = {"layers": ("0,2",), "max_tokens": None, "device": "cpu", "batch_tokens": 512} | more
    return Settings(model=tuple(f"{name}={chats[name]}" for name in names), dataset=corpus, store=store, **given)


@pytest.fixture(scope="module")
def made(chats, corpus, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "chats.zarr"
    extract(prepare(settings(path, chats, corpus), quiet=True), quiet=True)
    return path


class TestStore:
    def test_it_says_what_it_is(self, made):
        attributes = open_store(made).attributes["corpus"]
        assert (attributes["form"], attributes["date"]) == ("messages", DATE)
        assert len(open_store(made).model("llama").attributes["chat_template_sha256"]) == 64

    def test_conversations_come_back(self, made):
        corpus = open_store(made).corpus
        for number, row in enumerate(ROWS):
            said = parse_conversation(row, "w")
            assert conversation_of(corpus, number) == said
            assert corpus.document_id[number].tobytes() == said.id
            assert corpus.window_text(number) == said.text, "a conversation is one window"

    def test_rows_have_the_role_of_who_wrote_them(self, made):
        store = open_store(made)
        for name in store.models:
            table, corpus = store.tokens(name), store.corpus
            for window, row in enumerate(ROWS):
                said = parse_conversation(row, "w")
                mine = np.flatnonzero((table.window == window) & ~table.special)
                for at in mine:
                    end = table.byte_end[at]
                    writer = next(p.role for p in said.parts if p.start < end <= p.end)
                    assert table.role[at] == writer
            assert not table.role[table.special].any()
            assert set(np.unique(table.role)) == {
                ROLES.index(r) for r in ("text", "system", "user", "assistant", "tool")
            }
            assert len(corpus.message_role) == sum(len(row["messages"]) for row in ROWS)

    def test_pairs_have_read_the_same_bytes(self, made, chats):
        store = open_store(made)
        pairs = store.pairs("llama", "mistral")
        truth = {}
        for name, keeps in (("llama", as_it_is), ("mistral", stripped)):
            tokenizer = models.inspect_model(spec.parse_model(f"{name}={chats[name]}")).tokenizer
            tokenizer.split_special_tokens = store.attributes["corpus"].get("control_tokens") == "text"
            table = store.tokens(name)
            for window, row in enumerate(ROWS):
                if "quoted" in CHATS and row is CHATS["quoted"] and not tokenizer.split_special_tokens:
                    continue
                mine = np.flatnonzero(table.window == window)
                read = read_by(tokenizer, parse_conversation(row, "w"), table.id[mine], keeps)
                np.testing.assert_array_equal(read.byte_end, table.byte_end[mine])
                truth |= {(name, int(at)): int(end) for at, end in zip(mine, read.byte_end, strict=True)}
        compared = 0
        for a, b in zip(pairs.row_source.tolist(), pairs.row_target.tolist(), strict=True):
            if ("llama", a) in truth:
                assert truth["llama", a] == truth["mistral", b] > 0
                compared += 1
        assert compared > 100

    def test_words_end_where_messages_do(self, made, tmp_path, capsys):
        path = shutil.copytree(made, tmp_path / "chats.zarr")
        assert call(capsys, "featstore", "pair", path, "--policy", "word").code == 0
        store = open_store(path)
        pairs, table = store.pairs("llama", "mistral", "word"), store.tokens("llama")
        window = list(CHATS).index("names of roles")
        ends = table.byte_end[pairs.row_source[table.window[pairs.row_source] == window]]
        assert ends.tolist() == [4, 13, 18, 22], "user, assistant, model, tool"

    def test_it_is_whole(self, made):
        assert verify_store(made, quiet=True)["damage"] == []
        assert check_tokens(open_store(made), quiet=True) == {
            "tokenized": ["llama", "mistral"],
            "damage": [],
            "not_checked": [],
        }

    def test_states_are_those_of_the_rendering(self, made, chats):
        import torch
        from transformers import AutoModelForCausalLM

        store, window = open_store(made), list(CHATS).index("tools")
        model = AutoModelForCausalLM.from_pretrained(chats["llama"], dtype=torch.float32)
        rows = np.flatnonzero(store.tokens("llama").window == window)
        ids = torch.tensor(store.tokens("llama").id[rows][None])
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states[2][0].numpy()
        stored = store.rows("llama", 2)[rows]
        assert np.abs(stored - states).max() < 0.05 * np.abs(states).max()

    def test_info_and_inspect_name_roles(self, made, capsys):
        told = call(capsys, "featstore", "info", made, "--json").json
        said = [message["role"] for row in ROWS for message in row["messages"]]
        assert told["messages"] == {role: said.count(role) for role in ("system", "user", "assistant", "tool")}
        assert f"{said.count('user')} user, {said.count('assistant')} assistant" in call(
            capsys, "featstore", "info", made
        ).out.replace("\n", " ")
        roles = told["models"]["llama"]["roles"]
        table = open_store(made).tokens("llama")
        assert sum(roles.values()) == np.count_nonzero(~table.special)
        shown = call(capsys, "featstore", "inspect", made, "--window", list(CHATS).index("system")).out
        assert "role, text" in shown
        assert re.search(r" \d+  system    'Be'\n", shown)
        assert re.search(r" \*\s+-            ''\n", shown), "the template's tokens have none"

    def test_the_same_command_and_a_smaller_one_add_nothing(self, made, chats, corpus, tmp_path):
        path = shutil.copytree(made, tmp_path / "chats.zarr")
        before = open_store(path).fingerprint
        extract(prepare(settings(path, chats, corpus), quiet=True), quiet=True)
        assert open_store(path).fingerprint == before


class TestLater:
    def test_a_model_that_joins_reads_the_same_from_the_store_alone(self, made, chats, tmp_path):
        path = shutil.copytree(made, tmp_path / "chats.zarr")
        joined = Settings(
            store=path, model=(f"late={chats['late']}",), layers=("0,2",), device="cpu",
            given=frozenset({"model", "layers", "device"}),
        )  # fmt: skip
        extract(prepare(joined, quiet=True), quiet=True)
        store = open_store(path)
        assert list(store.models) == ["llama", "mistral", "late"]
        tokenizer = models.inspect_model(spec.parse_model(f"late={chats['late']}")).tokenizer
        said = [parse_conversation(row, "w") for row in ROWS]
        expected = tokenize_conversations(tokenizer, "late", said)
        table = store.tokens("late")
        np.testing.assert_array_equal(table.id, np.concatenate([window.ids for window in expected]))
        np.testing.assert_array_equal(table.byte_end, np.concatenate([window.byte_end for window in expected]))
        assert verify_store(path, quiet=True)["damage"] == []
        assert len(store.pairs("llama", "late")) > 100

    def test_more_rows_grow_it(self, made, chats, corpus, tmp_path):
        path = tmp_path / "chats.zarr"
        extract(prepare(settings(path, chats, corpus, max_documents=15), quiet=True), quiet=True)
        assert len(open_store(path).corpus.document_id) == 15
        extract(prepare(settings(path, chats, corpus), quiet=True), quiet=True)
        whole, grown = open_store(made), open_store(path)
        for column in ("id", "byte_end", "special", "role"):
            np.testing.assert_array_equal(
                getattr(whole.tokens("llama"), column), getattr(grown.tokens("llama"), column)
            )
        assert [conversation_of(grown.corpus, d) for d in range(len(ROWS))] == [
            conversation_of(whole.corpus, d) for d in range(len(ROWS))
        ]
        assert verify_store(path, quiet=True)["damage"] == []

    def test_a_template_that_has_changed_is_named(self, made, chats, corpus, tmp_path):
        path = shutil.copytree(made, tmp_path / "chats.zarr")
        other = chats | {"llama": chatting(chats["llama"], CHATML + "!", tmp_path / "llama")}
        with pytest.raises(StoreStateError, match=r"llama\.chat_template_sha256"):
            extract(prepare(settings(path, other, corpus, layers=("0,1,2",)), quiet=True), quiet=True)
        result = check_tokens(open_store(path), [f"llama={other['llama']}"], quiet=True)
        assert result["not_checked"] == ["llama: tokens against text, as its chat template has changed since"]

    def test_an_earlier_wish_leaves_nothing_behind(self, chats, corpus, tmp_path, monkeypatch):
        """Conversations were planned, nothing came of it, and then text is read into the same store."""
        path = tmp_path / "store.zarr"
        from featstore.extraction import run

        def stop(*_args, **_kwargs):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(run, "extract_rows", stop)
            with pytest.raises(KeyboardInterrupt):
                extract(prepare(settings(path, chats, corpus), quiet=True), quiet=True)
        assert (path / "corpus/message/rest_start").is_dir()
        text = write(tmp_path / "text.jsonl", [{"text": f"Plain text number {i}."} for i in range(9)])
        extract(prepare(settings(path, chats, text), quiet=True), quiet=True)
        store = open_store(path)
        assert store.attributes["corpus"]["form"] == "text"
        assert "date" not in store.attributes["corpus"]
        assert not (path / "corpus/message/rest_start").exists()
        assert verify_store(path, quiet=True)["damage"] == []


class TestDamage:
    @pytest.mark.parametrize(
        ("array", "change", "words"),
        [
            ("role", lambda a: np.full_like(a, 9), "unknown role"),
            ("role", lambda a: np.roll(a, 1), "roles are not those of the messages"),
            ("end", lambda a: a - (a > 0), "messages do not"),
            ("start", lambda a: a + 1, "do not cover|do not lie"),
            ("document", lambda a: a[::-1].copy(), "do not lie within"),
            ("rest", lambda a: np.where(a == ord("{"), ord("["), a).astype(np.uint8), "not what JSON holds"),
            ("rest_start", lambda a: a + 1, "offsets do not fit"),
        ],
    )
    def test_verify_sees_it(self, made, array, change, words):
        store = open_store(made)
        held = store.corpus
        name = f"message_{array}"
        changed = dataclasses.replace(held, **{name: change(getattr(held, name))})
        store.__dict__["corpus"] = changed
        # What reading the text refuses comes before what is compared with it.
        found = [*corpus_problems(changed, None), *verify._check_corpus(store), *verify._check_tokens(store, "llama")]
        assert any(re.search(words, line) for line in found), found


class TestSettings:
    def test_the_first_messages_that_fit(self, chats, corpus, tmp_path):
        path = tmp_path / "short.zarr"
        extract(prepare(settings(path, chats, corpus, max_document_bytes=40), quiet=True), quiet=True)
        store = open_store(path)
        assert np.diff(store.corpus.document_start).max() <= 40
        whole = {parse_conversation(row, "w").id: parse_conversation(row, "w") for row in ROWS}
        for number, identity in enumerate(store.corpus.document_id):
            kept, said = conversation_of(store.corpus, number), whole[identity.tobytes()]
            assert kept.messages == said.messages[: len(kept.messages)]

    def test_one_that_is_longer_than_the_context(self, chats, corpus, tmp_path):
        long = write(tmp_path / "long.jsonl", [*ROWS, {"messages": [say("user", "long " * 4000)]}])
        row = f"long.jsonl, line {len(ROWS) + 1}: a conversation of 20000 bytes has .* tokens, more than the context"
        with pytest.raises(SpecError, match=row):
            prepare(settings(tmp_path / "s.zarr", chats, long, window_bytes=64), quiet=True)

    def test_composed(self, chats, tmp_path):
        rows = [{"messages": [say("user", f"cafe\u0301 {i}"), say("assistant", "e\u0301")]} for i in range(6)]
        path = tmp_path / "nfc.zarr"
        corpus = write(tmp_path / "rows.jsonl", rows)
        extract(prepare(settings(path, chats, corpus, normalise="nfc"), quiet=True), quiet=True)
        assert conversation_of(open_store(path).corpus, 0).text == "caf\u00e9 0\u00e9"
        assert verify_store(path, quiet=True)["damage"] == []

    def test_compressed_rows_through_the_api(self, chats, corpus, made, tmp_path):
        packed = tmp_path / "chats.jsonl.gz"
        packed.write_bytes(gzip.compress(Path(corpus.removeprefix("jsonl:")).read_bytes()))
        store = featstore.extract(
            store=tmp_path / "s.zarr", models=chats | {"late": chats["late"]}, layers=[0], dataset=f"jsonl:{packed}",
            device="cpu", quiet=True,
        )  # fmt: skip
        np.testing.assert_array_equal(store.tokens("llama").id, open_store(made).tokens("llama").id)

    @pytest.mark.parametrize(
        ("rows", "words"),
        [
            ([*ROWS[:2], {"text": "plain"}], "rows.jsonl, line 3: text, where .*line 1 holds messages; keep text and"),
            ([{"text": "plain"}, ROWS[0]], "rows.jsonl, line 2: messages, where .*line 1 holds text"),
            ([*ROWS[:1], {"messages": [{"role": "bot", "content": "a"}]}], "line 2, message 1: unknown role 'bot'"),
            ([*ROWS[:1], {"conversations": []}], "line 2: no field 'text'"),
        ],
    )
    def test_one_line_says_what_is_wrong(self, rows, words, chats, tmp_path):
        with pytest.raises(CorpusError, match=words) as caught:
            prepare(settings(tmp_path / "s.zarr", chats, write(tmp_path / "rows.jsonl", rows)), quiet=True)
        assert "\n" not in str(caught.value)

    def test_a_model_without_a_template(self, chats, tiny_llama, corpus, tmp_path):
        with pytest.raises(CorpusError, match=r"model 'llama' has no chat template.*chats.jsonl, line 1"):
            prepare(settings(tmp_path / "s.zarr", chats | {"llama": tiny_llama}, corpus), quiet=True)
