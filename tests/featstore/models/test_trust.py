"""References out of files: the user's own are taken, others are shown and need a word."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from featstore import api
from featstore.errors import StrangeReferenceError
from featstore.extraction.job import prepare
from featstore.extraction.named import references_of
from featstore.extraction.run import extract
from featstore.extraction.settings import Settings
from featstore.models import trust
from featstore.models.loading import inspect_model
from featstore.models.references import Allowed, ModelSpec
from featstore.models.trust import named, remember, vouch, vouch_for_text
from featstore.runtime.known import Named, ledger_path, recall
from featstore.store import open_store
from featstore.text.sources import parse_source
from tests.support.checkpoints import lora
from tests.support.commands import call
from tests.support.ownership import mine

YES = Allowed(references=True)
HUB = ModelSpec("m", "owner/model")


@pytest.fixture(autouse=True)
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user who has named nothing yet, in an empty folder; shown lines are shown again."""
    monkeypatch.setenv("FEATSTORE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(trust, "_SAID", set())
    return tmp_path


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever asks a hub, or opens a socket at all, fails the test."""

    def refuse(*_, **__):
        raise AssertionError("a hub was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    for name in ("hf_hub_download", "snapshot_download", "get_hf_file_metadata"):
        monkeypatch.setattr(f"huggingface_hub.file_download.{name}", refuse, raising=False)


@pytest.fixture
def theirs(tiny_store: Path, stranger: Path) -> Path:
    """A store from elsewhere: its models are on this disk, and the user has named none of them."""
    return Path(shutil.copytree(tiny_store, stranger / "theirs.zarr"))


def test_a_reference_is_known_by_where_it_leads(stranger: Path) -> None:
    (stranger / "model").mkdir()
    (stranger / "here" / "link").symlink_to(stranger / "model")
    for spelling in ("../model", "link", str(stranger / "model"), str(stranger / "here" / ".." / "model")):
        assert named(ModelSpec("m", spelling)) == Named("path", str((stranger / "model").resolve()))
    assert named(HUB) == named(ModelSpec("x", "owner/model", "main")) == Named("hub", "owner/model", "main")
    assert named(ModelSpec("m", "owner/model", "other")) != named(HUB)
    assert named(ModelSpec("m", "~nobody-has-this-name/x")).kind == "path"
    assert named(ModelSpec("m", "./a\0b")).kind == "path"


@pytest.mark.parametrize("ref", ["owner/model", "/nowhere/model", "../model", "~/model", "/x.gguf"])
def test_what_nobody_named_is_shown_and_refused(ref: str, capsys: pytest.CaptureFixture[str]) -> None:
    spec = ModelSpec("m", ref)
    with pytest.raises(StrangeReferenceError) as raised:
        vouch([spec], "some.zarr")
    said = str(raised.value)
    assert said.startswith(f"some.zarr names m='{ref}' (")
    assert "give --yes (yes=True in Python), or say which model you mean: --model m=REF" in said
    assert "\n" not in said
    vouch([ModelSpec("m", ref, allowed=YES)], "some.zarr")
    assert capsys.readouterr().err.startswith(f"as some.zarr says: m='{ref}' (")
    remember([spec])
    vouch([spec], "some.zarr")


def test_control_characters_are_shown_escaped() -> None:
    with pytest.raises(StrangeReferenceError, match=r"m='owner/\\x1b\[2Jm\\n'"):
        vouch([ModelSpec("m", "owner/\x1b[2Jm\n")], "some.zarr")


def test_what_lies_in_the_working_folder_needs_nothing(stranger: Path) -> None:
    vouch([ModelSpec("m", "./model"), ModelSpec("m", str(stranger / "here" / "x" / "m.gguf"))], "some.zarr")
    (stranger / "here" / "out").symlink_to(stranger)
    with pytest.raises(StrangeReferenceError, match="outside the working folder"):
        vouch([ModelSpec("m", "./out/model")], "some.zarr")


def test_the_root_of_the_disk_is_no_working_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    with pytest.raises(StrangeReferenceError):
        vouch([ModelSpec("m", "/nowhere/model")], "some.zarr")


def test_every_strange_one_is_shown_at_once() -> None:
    remember([ModelSpec("known", "owner/known")])
    specs = [HUB, ModelSpec("known", "owner/known"), ModelSpec("n", "owner/other", "v2")]
    with pytest.raises(StrangeReferenceError, match=r"names m='owner/model' .from a hub., n='owner/other@v2' "):
        vouch(specs, "some.zarr")


def test_a_ledger_that_cannot_be_used_is_said() -> None:
    ledger_path().parent.mkdir()
    ledger_path().write_text("no")
    with pytest.raises(StrangeReferenceError, match="is not a ledger of references; remove it"):
        vouch([HUB], "some.zarr")


def test_a_ledger_that_cannot_be_written_is_said(stranger: Path, monkeypatch, capsys) -> None:
    (stranger / "file").write_text("")
    monkeypatch.setenv("FEATSTORE_CACHE", str(stranger / "file"))
    remember([HUB])
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "later commands will ask for --yes" in said


def test_texts_are_known_like_models(stranger: Path) -> None:
    for text in ("hf:owner/data", "jsonl:/nowhere/x.jsonl", "text:../*.txt"):
        source = parse_source(text)
        with pytest.raises(StrangeReferenceError, match="say which text you mean: --dataset"):
            vouch_for_text(source, "some.zarr", Allowed())
        vouch_for_text(source, "some.zarr", YES, quiet=True)
        remember(text=source)
        vouch_for_text(source, "some.zarr", Allowed())
    vouch_for_text(parse_source("text:articles/*.txt"), "some.zarr", Allowed())


class TestStores:
    def test_its_models_are_shown_before_one_is_looked_for(self, theirs: Path, capsys) -> None:
        for words in (
            ("verify", theirs, "--reextract", 1),
            ("verify", theirs, "--retokenise"),
            ("pair", theirs, "--rebuild"),
        ):
            said = call(capsys, "featstore", *words).refusal
            assert said.startswith(f"featstore: {theirs} names llama='/"), said
            assert ", mistral='/" in said
            assert "give --yes" in said
        assert recall()[0] == frozenset()

    def test_a_word_or_a_name_is_enough(self, theirs: Path, tiny_llama: Path, tiny_mistral: Path, capsys) -> None:
        done = call(capsys, "featstore", "verify", theirs, "--retokenise", "--yes")
        assert done.code == 0
        assert f"as {theirs} says: llama='{tiny_llama}'" in done.err
        assert recall()[0] == frozenset()  # for this time
        words = [
            part
            for name, place in (("llama", tiny_llama), ("mistral", tiny_mistral))
            for part in ("--model", f"{name}={place}")
        ]
        assert call(capsys, "featstore", "verify", theirs, "--retokenise", *words).code == 0
        assert call(capsys, "featstore", "verify", theirs, "--retokenise").code == 0  # they are the user's from now on

    def test_adding_to_one_asks_as_well(self, theirs: Path, tiny_llama: Path, tiny_mistral: Path) -> None:
        more = Settings(store=theirs, layers=("llama=1",), device="cpu", given=frozenset({"layers"}))
        with pytest.raises(StrangeReferenceError, match="names llama="):
            prepare(more, quiet=True)
        with pytest.raises(StrangeReferenceError):
            api.extract(store=theirs, layers="llama=1", quiet=True)
        mine(tiny_llama, tiny_mistral)
        longer = Settings(store=theirs, max_tokens=90_000, device="cpu", given=frozenset({"max_tokens"}))
        with pytest.raises(StrangeReferenceError, match="names the text 'jsonl:"):
            prepare(longer, quiet=True)

    def test_what_was_extracted_is_the_users_own(self, tiny_llama: Path, short_corpus: Path, stranger: Path) -> None:
        typed = {"model": (f"m={tiny_llama}",), "layers": ("0",), "dataset": f"jsonl:{short_corpus}"}
        made = Settings(store=stranger / "s.zarr", max_tokens=2000, device="cpu", **typed)
        extract(prepare(made, quiet=True), quiet=True)
        assert references_of(open_store(stranger / "s.zarr")) == {"m": f"m={tiny_llama}"}
        longer = Settings(store=stranger / "s.zarr", max_tokens=2500, device="cpu", given=frozenset({"max_tokens"}))
        assert prepare(longer, quiet=True).plan.models["m"].rows > 2000


class TestAdapters:
    def test_a_base_that_nobody_named_is_refused(self, tiny_llama: Path, stranger: Path) -> None:
        lora(tiny_llama, stranger / "own")
        spec = ModelSpec("m", str(stranger / "own"))
        with pytest.raises(
            StrangeReferenceError, match=r"adapter_config.json of .* names m='.*llama' .*featstore doctor"
        ):
            inspect_model(spec)
        assert inspect_model(ModelSpec("m", spec.ref, allowed=YES)).adapter is not None
        mine(tiny_llama)
        assert inspect_model(spec).adapter is not None

    def test_a_hub_is_not_asked_for_one(self, stranger: Path) -> None:
        lora(Path("owner/model"), stranger / "own")
        with pytest.raises(StrangeReferenceError, match=r"names m='owner/model' \(from a hub\)"):
            inspect_model(ModelSpec("m", str(stranger / "own")))

    def test_what_lies_beside_it_is_the_users_too(self, tiny_llama: Path, stranger: Path) -> None:
        shutil.copytree(tiny_llama, stranger / "own" / "base")
        lora(stranger / "own" / "base", stranger / "own")
        assert inspect_model(ModelSpec("m", str(stranger / "own"))).adapter is not None

    @pytest.mark.parametrize("kind", ["XLORA", "SHADOW", "PROMPT_TUNING", "NEW", None, ["LORA"]])
    def test_kinds_that_name_further_files_are_refused(self, tiny_llama: Path, stranger: Path, kind) -> None:
        lora(tiny_llama, stranger / "own", peft_type=kind)
        mine(tiny_llama)
        with pytest.raises(OSError, match="which may name further files"):
            inspect_model(ModelSpec("m", str(stranger / "own")))

    def test_doctor_names_both(self, tiny_llama: Path, stranger: Path, capsys) -> None:
        lora(tiny_llama, stranger / "own")
        words = ("doctor", "--quick", "--model", f"m={stranger / 'own'}")
        refused = call(capsys, "featstore", *words)
        assert refused.code == 1
        assert "which you have not named yourself" in refused.out
        assert call(capsys, "featstore", *words, "--yes").code == 0
        assert call(capsys, "featstore", *words).code == 0  # who was shown it has named it
        assert os.path.realpath(tiny_llama) in {one.reference for one in recall()[0]}
