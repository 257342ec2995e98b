"""Generated tokens: every model answers, both read the answers, and a second command finds the same text."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import featstore
from featstore import open_store
from featstore.errors import CorpusError, ModelLoadError, ProbeError, SpecError, StoreStateError
from featstore.extraction import generating
from featstore.extraction.flags import parse_settings
from featstore.extraction.job import prepare
from featstore.models import answering
from featstore.runtime.processes import Ranks
from featstore.store.inspect.verify import verify_store
from featstore.text.roles import ASSISTANT, GENERATED, TEXT, USER
from tests.support.commands import call

NEW = 6
#: Writes every message between marks, and nothing into the messages.
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, sample_texts: list[str]) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"text": text[: 90 + 17 * i].rsplit(" ", 1)[0]} for i, text in enumerate(sample_texts[:12])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"jsonl:{path}"


@pytest.fixture
def fresh_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """Gives the command an empty cache of its own."""

    def use(name: str) -> Path:
        directory = tmp_path / "caches" / name
        monkeypatch.setenv("FEATSTORE_CACHE", str(directory))
        return directory

    use("first")
    return use


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each batch had that a model really answered."""
    seen: list[int] = []
    real = answering.answers

    def counted(stream: Any, prompts: Any, **rest: Any) -> Any:
        seen.append(len(prompts))
        return real(stream, prompts, **rest)

    monkeypatch.setattr(answering, "answers", counted)
    return seen


@pytest.fixture
def pair(tiny_llama: Path, tiny_mistral: Path) -> dict[str, Path]:
    return {"l": tiny_llama, "m": tiny_mistral}


def extracted(store: Path, **given: Any) -> featstore.Store:
    return featstore.extract(store=store, **({"layers": [0], "device": "cpu", "quiet": True} | given))


def documents(store: featstore.Store) -> list[tuple[bytes, str, str]]:
    """Every document's id, prompt and answer."""
    held, found = store.corpus, []
    for number, identity in enumerate(held.document_id):
        raw = held.text[held.document_start[number] : held.document_start[number + 1]].tobytes()
        own = np.flatnonzero(held.message_document == number)
        at = int(held.message_start[own[-1]]) if len(own) else len(raw)
        found.append((identity.tobytes(), raw[:at].decode(), raw[at:].decode()))
    return found


def test_every_model_answers_and_both_read_every_answer(pair, corpus, tmp_path, fresh_cache):
    store = extracted(tmp_path / "s.zarr", models=pair, dataset=corpus, generate=NEW, max_documents=5)
    held = documents(store)
    assert len(held) == 10
    for (first, prompt, one), (second, again, other) in zip(held[::2], held[1::2], strict=True):
        assert (first, prompt) == (second, again)
        assert one != other
    assert all(answer for *_, answer in held)
    assert store.attributes["corpus"]["generate"] == {
        "tokens": NEW,
        "with": ["l", "m"],
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": 0,
    }
    # The answers are text like any other: tokens of both models, of role generated, that pair.
    for name in pair:
        table = store.tokens(name)
        assert set(table.role.tolist()) == {TEXT, GENERATED}
        assert (table.role[table.special] == TEXT).all()
    pairs = store.pairs("l", "m")
    role = store.tokens("l").role[pairs.row_source]
    assert (role == store.tokens("m").role[pairs.row_target]).all()
    assert (role == GENERATED).sum() > 10
    # All that answers one prompt is in one split, and is resampled as one.
    split = store.corpus.document_split
    assert (split[::2] == split[1::2]).all()
    assert set(pairs.document.tolist()) <= set(range(0, 10, 2))
    assert verify_store(tmp_path / "s.zarr", quiet=True)["damage"] == []


def test_the_answer_is_what_the_model_says_alone(pair, corpus, tmp_path, fresh_cache):
    """Batched with longer prompts, padded at the left: transformers' own greedy text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    store = extracted(
        tmp_path / "s.zarr",
        models=pair,
        dataset=corpus,
        generate=NEW,
        generate_with="m",
        max_documents=4,
        dtype="float32",
    )
    tokenizer = AutoTokenizer.from_pretrained(pair["m"])
    model = AutoModelForCausalLM.from_pretrained(pair["m"], dtype=torch.float32).eval()
    for _, prompt, answer in documents(store):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)[0]
        whole = tokenizer.decode(made, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert whole.rstrip("\ufffd") == prompt + answer


def test_samples_are_drawn_again_alike_whatever_shares_their_batch(pair, corpus, tmp_path, fresh_cache):
    options = {"models": pair, "dataset": corpus, "generate": NEW, "temperature": 3.0, "top_p": 0.95, "seed": 5}
    many = documents(extracted(tmp_path / "many.zarr", **options, max_documents=6))
    fresh_cache("second")
    few = documents(extracted(tmp_path / "few.zarr", **options, max_documents=6, batch_tokens=1))
    assert many == few
    fresh_cache("third")
    greedy = {key: value for key, value in options.items() if key not in ("temperature", "top_p")}
    assert [answer for *_, answer in documents(extracted(tmp_path / "g.zarr", **greedy, max_documents=6))] != [
        answer for *_, answer in many
    ]
    recorded = open_store(tmp_path / "many.zarr").attributes["corpus"]["generate"]
    assert (recorded["temperature"], recorded["top_p"], recorded["seed"]) == (3.0, 0.95, 5)


def test_the_seed_decides_what_is_drawn(pair, tmp_path, fresh_cache, corpus):
    """The seed also shuffles: the prompts are compared one by one."""
    found = {}
    for seed in (1, 2):
        store = extracted(
            tmp_path / f"{seed}.zarr", models=pair, dataset=corpus, generate=NEW, temperature=3.0, seed=seed
        )
        found[seed] = {(prompt, number % 2): answer for number, (_, prompt, answer) in enumerate(documents(store))}
    assert found[1].keys() == found[2].keys()
    assert sum(found[1][key] != found[2][key] for key in found[1]) > len(found[1]) / 2


def test_a_killed_command_goes_on_with_what_was_answered(pair, corpus, tmp_path, fresh_cache, batches, monkeypatch):
    whole = documents(extracted(tmp_path / "w.zarr", models=pair, dataset=corpus, generate=NEW, batch_tokens=200))
    assert sum(batches) == 24
    fresh_cache("killed")
    counted, calls = answering.answers, []

    def killed(*args: Any, **rest: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return counted(*args, **rest)

    batches.clear()
    monkeypatch.setattr(answering, "answers", killed)
    with pytest.raises(KeyboardInterrupt):
        extracted(tmp_path / "k.zarr", models=pair, dataset=corpus, generate=NEW, batch_tokens=200)
    monkeypatch.setattr(answering, "answers", counted)
    done = sum(batches)
    assert done > 0
    batches.clear()
    store = extracted(tmp_path / "k.zarr", models=pair, dataset=corpus, generate=NEW, batch_tokens=200)
    assert sum(batches) == 24 - done
    assert documents(store) == whole
    assert store.fingerprint == open_store(tmp_path / "w.zarr").fingerprint


def test_more_documents_answer_the_new_ones_alone(pair, corpus, tmp_path, fresh_cache, batches):
    path = tmp_path / "s.zarr"
    options: dict[str, Any] = {"models": pair, "dataset": corpus, "generate": NEW, "temperature": 2.0}
    first = documents(extracted(path, **options, max_documents=4))
    # Without the cache the store itself has the answers.
    fresh_cache("lost")
    batches.clear()
    # With the cache it is lost what the user named before.
    more = documents(extracted(path, layers=None, max_documents=7, yes=True))
    assert sum(batches) == 2 * 3
    assert more[:8] == first
    assert len(more) == 14


def test_a_larger_budget_goes_on_where_the_smaller_one_cut(pair, corpus, tmp_path, fresh_cache):
    path = tmp_path / "s.zarr"
    options: dict[str, Any] = {"models": pair, "dataset": corpus, "generate": 40, "window_bytes": 64}
    first = extracted(path, **options, max_tokens=400)
    read = first.corpus.text.tobytes()
    more = extracted(path, layers=None, max_tokens=600)
    assert more.corpus.text.tobytes().startswith(read)
    assert len(more.corpus.document_id) > len(first.corpus.document_id)
    assert documents(extracted(tmp_path / "once.zarr", **options, max_tokens=600)) == documents(more)


def test_a_model_that_joins_reads_the_text_that_is_there(pair, corpus, tmp_path, fresh_cache, batches):
    path = tmp_path / "s.zarr"
    first = documents(extracted(path, models={"l": pair["l"]}, dataset=corpus, generate=NEW, max_documents=4))
    batches.clear()
    store = extracted(path, models={"m": pair["m"]})
    assert (documents(store), batches, store.models) == (first, [], ("l", "m"))
    assert store.attributes["corpus"]["generate"]["with"] == ["l"]


def test_a_budget_answers_no_more_than_a_few_prompts_beyond_it(pair, tmp_path, fresh_cache, batches, monkeypatch):
    monkeypatch.setattr(generating, "_LEAST", 2)
    path = tmp_path / "many.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"Prompt {i} of very many, of which few are read"}) + "\n" for i in range(400))
    )
    store = extracted(tmp_path / "s.zarr", models=pair, dataset=f"jsonl:{path}", generate=NEW, max_tokens=600)
    read = len(store.corpus.document_id)
    assert max(store.model(name).rows for name in pair) > 600 - 40
    assert read <= sum(batches) <= read + 6


def test_long_prompts_are_cut_to_leave_room(pair, tmp_path, fresh_cache, sample_texts):
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(sample_texts[i : i + 6])}) + "\n" for i in range(3)))
    store = extracted(tmp_path / "s.zarr", models=pair, dataset=f"jsonl:{path}", generate=24, window_bytes=1024)
    for (identity, prompt, _), row in zip(documents(store)[::2], path.read_text().splitlines(), strict=True):
        text = json.loads(row)["text"]
        assert text.startswith(prompt)
        assert 1000 < len(prompt) < len(text)
        assert identity == hashlib.sha256(text.encode()).digest()


def test_a_model_that_says_nothing_leaves_the_prompt(capsys, pair, corpus, tmp_path, fresh_cache, monkeypatch):
    monkeypatch.setattr(answering, "answers", lambda _, prompts, **__: [[2] for _ in prompts])
    words = ("extract", "--model", f"l={pair['l']}", "--layers", "0", "--dataset", corpus, "--device", "cpu")
    words = (*words, "--store", tmp_path / "s.zarr", "--generate", "4", "--max-documents", "3")
    ran = call(capsys, "featstore", *words)
    assert ran.code == 0
    assert "note: 3 of the answers are empty" in ran.err
    store = open_store(tmp_path / "s.zarr")
    assert [answer for *_, answer in documents(store)] == ["", "", ""]
    assert (len(store.corpus.message_role), set(store.tokens("l").role.tolist())) == (0, {TEXT})


def test_a_dry_run_says_what_would_be_generated_and_asks_no_model(capsys, pair, corpus, tmp_path, fresh_cache, batches):
    words = ["extract", "--layers", "0", "--dataset", corpus, "--device", "cpu", "--store", tmp_path / "s.zarr"]
    words += ["--model", f"l={pair['l']}", "--model", f"m={pair['m']}", "--generate", "4", "--max-documents", "3"]
    result = call(capsys, "featstore", *words, "--dry-run", "--json").json
    assert batches == []
    assert (result["generate"]["documents"], result["generate"]["tokens"], result["generate"]["with"]) == (
        6,
        4,
        ["l", "m"],
    )
    assert result["generate"]["bytes_at_most"] == 6 * 4 * (2 * 48 + 4 + 2 * 32 + 4)  # each row has a norm
    assert "l and m would write up to 4 tokens after each prompt" in call(capsys, "featstore", *words, "--dry-run").out
    assert call(capsys, "featstore", *words).code == 0
    # Now they are known.
    (tmp_path / "again.zarr").mkdir()
    words[words.index(tmp_path / "s.zarr")] = tmp_path / "again.zarr"
    assert call(capsys, "featstore", *words, "--dry-run", "--json").json["generate"]["documents"] == 0
    assert "up to 4 tokens by l and by m" in call(capsys, "featstore", "info", tmp_path / "s.zarr", "--no-spectrum").out


def test_of_several_processes_the_first_one_answers(pair, corpus, tmp_path, fresh_cache, batches, monkeypatch):
    given = {"model": [f"{name}={path}" for name, path in pair.items()], "layers": ["0"], "dataset": corpus}
    settings = parse_settings({**given, "store": tmp_path / "s.zarr", "device": "cpu", "generate": NEW})
    waits: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(Ranks, "wait", lambda ranks: waits.append(ranks.rank))
        patch.setenv("WORLD_SIZE", "2")
        patch.setenv("RANK", "1")
        with pytest.raises(ModelLoadError, match="the answers of the first process did not arrive"):
            prepare(settings, quiet=True)
        patch.setenv("RANK", "0")
        first = prepare(settings, quiet=True)
        answered = sum(batches)
        patch.setenv("RANK", "1")
        assert prepare(settings, quiet=True).plan.hash == first.plan.hash
    assert (answered, sum(batches)) == (24, 24)
    # Each process waits as often as the other, once for each model.
    assert waits == [1, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"generate": 0}, "--generate 0: give a number of at least 1"),
        ({"temperature": -0.5}, "--temperature -0.5: give a number of at least 0"),
        ({"temperature": float("inf")}, "--temperature inf: give a finite number"),
        ({"top_p": 0}, "--top-p 0: give a number above 0 and at most 1"),
        ({"top_p": 1.5}, "--top-p 1.5: give a number above 0 and at most 1"),
    ],
)
def test_flags_outside_their_range_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_settings(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"generate": 4, "generate_with": "x"}, "--generate-with x: there is no such model; name one of l, m"),
        ({"temperature": 1.0}, "--temperature needs --generate"),
        ({"generate_with": ["l"]}, "--generate-with needs --generate"),
        ({"generate": 4, "top_p": 0.9}, "--top-p 0.9 needs --temperature"),
        ({"generate": 1024}, "a context of 1024 tokens leaves model 'l' no room for a prompt"),
    ],
)
def test_what_cannot_be_meant_is_refused(pair, corpus, tmp_path, given, message):
    with pytest.raises(SpecError, match=message):
        extracted(tmp_path / "s.zarr", models=pair, dataset=corpus, **given)
    assert not (tmp_path / "s.zarr").exists()


def test_a_store_keeps_its_way_of_asking(pair, corpus, tmp_path, fresh_cache):
    path = tmp_path / "s.zarr"
    extracted(path, models=pair, dataset=corpus, generate=NEW, max_documents=3)
    for given, message in (
        ({"generate": NEW + 1}, f"generated with --generate {NEW}, not {NEW + 1}"),
        ({"generate_with": "m"}, "generated with --generate-with l,m, not m"),
        ({"temperature": 0.5}, "generated with --temperature 0, not 0.5"),
    ):
        with pytest.raises(StoreStateError, match=message):
            extracted(path, **given)
    # The same words once more, in another order, are no contradiction.
    before = open_store(path).fingerprint
    assert extracted(path, generate=NEW, generate_with=["m", "l"], max_documents=3).fingerprint == before
    plain = tmp_path / "plain.zarr"
    extracted(plain, models=pair, dataset=corpus, max_documents=3)
    assert "generate" not in open_store(plain).attributes["corpus"]
    with pytest.raises(StoreStateError, match="holds text that was not generated; leave --generate out"):
        extracted(plain, generate=NEW)


def test_a_model_that_cannot_go_on_is_refused(pair, corpus, tmp_path, fresh_cache, monkeypatch):
    def refuse(name: str, verdict: Any) -> None:
        raise ProbeError(f"{name}: {verdict.continuing.kind}")

    monkeypatch.setattr(generating, "refuse_continuing", refuse)
    with pytest.raises(ProbeError, match="l: cached"):
        extracted(tmp_path / "s.zarr", models=pair, dataset=corpus, generate=NEW)


# Messages -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chatting(tiny_llama: Path, tiny_mistral: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny models with a chat template."""
    found = {}
    for name, path in (("l", tiny_llama), ("m", tiny_mistral)):
        found[name] = tmp_path_factory.mktemp("chat") / name
        shutil.copytree(path, found[name])
        (found[name] / "chat_template.jinja").write_text(TEMPLATE)
    return found


def conversations(path: Path, rows: list[list[dict[str, str]]]) -> str:
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    return f"jsonl:{path}"


def test_messages_are_answered_in_the_assistants_turn(chatting, tmp_path, fresh_cache):
    rows = [[{"role": "user", "content": f"How many moons has planet {i}?"}] for i in range(4)]
    data = conversations(tmp_path / "chat.jsonl", rows)
    store = extracted(tmp_path / "s.zarr", models=chatting, dataset=data, generate=NEW)
    held = store.corpus
    assert len(held.document_id) == 8
    assert held.message_role.tolist() == [USER, ASSISTANT] * 8
    for number, (_, prompt, answer) in enumerate(documents(store)):
        assert prompt == rows[number // 2][0]["content"]
        assert answer
        assert answer == answer.strip()
    for name in chatting:
        assert set(store.tokens(name).role.tolist()) == {TEXT, USER, ASSISTANT}
    # The store knows the answers, too.
    fresh_cache("lost")
    again = {"store": tmp_path / "s.zarr", "max_documents": 4, "yes": True}
    assert prepare(parse_settings(again), load=False).unanswered == 0


@pytest.mark.parametrize("last", ["assistant", "system"])
def test_what_is_nobodys_turn_is_refused_with_its_row(chatting, tmp_path, last):
    rows = [[{"role": "user", "content": f"Hello {i}"}] for i in range(4)]
    rows[2].append({"role": last, "content": "Yes."})
    data = conversations(tmp_path / "chat.jsonl", rows)
    with pytest.raises(CorpusError, match=rf"chat.jsonl, line 3: the last of 2 messages is of role {last}; --generate"):
        extracted(tmp_path / "s.zarr", models=chatting, dataset=data, generate=NEW)


def test_an_answer_that_a_template_changes_is_left_out(chatting, tmp_path, fresh_cache, monkeypatch, capsys):
    """As a model's thoughts are, by the templates of models that think."""
    thinking = tmp_path / "thinking"
    shutil.copytree(chatting["l"], thinking)
    template = TEMPLATE.replace("m['content']", "m['content'].split('%%')[-1]")
    (thinking / "chat_template.jinja").write_text(template)
    real = generating.answers.spoken
    monkeypatch.setattr(generating.answers, "spoken", lambda *args: f"Thoughts %% {real(*args)}")
    rows = [[{"role": "user", "content": f"Hello {i}"}] for i in range(4)]
    words = ("extract", "--model", f"l={thinking}", "--layers", "0", "--device", "cpu", "--generate", "4")
    words = (*words, "--dataset", conversations(tmp_path / "chat.jsonl", rows), "--store", tmp_path / "s.zarr")
    ran = call(capsys, "featstore", *words)
    assert ran.code == 0
    assert "note: 4 of the answers are left out" in ran.err
    assert open_store(tmp_path / "s.zarr").corpus.message_role.tolist() == [USER] * 4
