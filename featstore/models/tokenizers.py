"""A tokenizer as its files mean it, whatever class transformers makes of them.

Three things differ from transformers' automatic loader. Control tokens that a text quotes are text, unless asked for.
A folder with a SentencePiece model alone gives SentencePiece's ids (:mod:`featstore.models.pieces`). And where there is
a ``tokenizer.json``, text is normalised and cut as it says: some classes take only its vocabulary and do the rest their
own way. What the tokenizer puts before a text is found out by tokenising one.

Tokens that were added without being special (Gemma's newlines, DeepSeek's ``<｜User｜>``, Qwen's ``<think>``) are
single tokens either way: they are text whose bytes are known, and pair by these.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from featstore.errors import ModelLoadError, SpecError
from featstore.models.pieces import PROBES, backend_of, read_pieces, refuse_other_ids
from featstore.runtime.provenance import digest

#: What control tokens that a text quotes are read as.
CONTROL_TOKENS = ("text", "special")
#: Parts of a tokenizer that decide into which ids a text is cut, and back.
_PARTS = ("normalizer", "pre_tokenizer", "decoder")


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer and what is known of it.

    Attributes:
        tokenizer: Of transformers; fast. Its ``split_special_tokens`` says what quoted control tokens are read as.
        hash: SHA-256 of its full definition, which control tokens being text or not does not change.
        start: ``{"id", "text"}`` of the token that it puts before a text; None where it puts none.
        asked: The start token that its configuration asks for; None where it asks for none.
    """

    tokenizer: Any
    hash: str
    start: dict[str, Any] | None
    asked: str | None


def check_control_tokens(value: str) -> None:
    """Refuse an unknown way to read control tokens.

    Args:
        value: As typed.

    Raises:
        SpecError: It is neither ``text`` nor ``special``.
    """
    if value not in CONTROL_TOKENS:
        raise SpecError(f"--control-tokens {value!r}: choose {' or '.join(CONTROL_TOKENS)}")


def held_control_tokens(corpus: Mapping[str, Any]) -> str:
    """How the tokens of a store read control tokens; stores made before there was a choice kept them as they are.

    Args:
        corpus: ``corpus`` of the store's attributes, or of a card.
    """
    return str(corpus.get("control_tokens", "special"))


def load_tokenizer(where: Mapping[str, Any], control_tokens: str = "text") -> LoadedTokenizer:
    """Load a tokenizer.

    Args:
        where: Keyword arguments of ``from_pretrained`` that say where it is.
        control_tokens: ``text``: what a text quotes of them is text; ``special``: it becomes control tokens.

    Raises:
        ModelLoadError: It is not fast, or its files cannot be read as they mean. The message does not name the model.
        SpecError: Another value.
    """
    from transformers import AutoTokenizer

    check_control_tokens(control_tokens)
    tokenizer = AutoTokenizer.from_pretrained(**where, use_fast=True)
    if not tokenizer.is_fast:
        raise ModelLoadError("its tokenizer gives no character offsets; a fast tokenizer is needed")
    if "gguf_file" not in where:
        definition, pieces = _file(where, "tokenizer.json"), _file(where, "tokenizer.model")
        if definition is not None:
            _follow_definition(tokenizer, definition)
        elif pieces is not None:
            _follow_pieces(tokenizer, pieces)
    tokenizer.split_special_tokens = control_tokens == "text"
    return LoadedTokenizer(
        tokenizer,
        digest([tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map]),
        _start(tokenizer),
        _asked(where, tokenizer),
    )


def start_missing(name: str, start: Mapping[str, Any] | None, asked: str | None) -> str | None:
    """What to say of a start token that is asked for and not added; None where there is nothing to say.

    Args:
        name: Of the model.
        start: The token that the tokenizer puts before a text.
        asked: The one that its configuration asks for.
    """
    if asked is None or (start is not None and start["text"] == asked):
        return None
    instead = (
        "puts none before a text (a chat template may write its own)"
        if start is None
        else f"puts {start['text']!r} before a text"
    )
    return (
        f"model {name!r}: its tokenizer_config.json asks for the start token {asked!r} (add_bos_token), but the "
        f"tokenizer as loaded {instead}; its states are of that, and a tokenizer.json whose post-processor adds the "
        "token would change them"
    )


def _file(where: Mapping[str, Any], name: str) -> Path | None:
    """A file of the tokenizer on this disk: the automatic loader has fetched what there is."""
    from transformers.utils import cached_file

    found = cached_file(
        where["pretrained_model_name_or_path"],
        name,
        revision=where.get("revision"),
        local_files_only=True,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _follow_definition(tokenizer: Any, path: Path) -> None:
    """Normalise, cut and decode as a ``tokenizer.json`` says, where the class does so in another way.

    LlamaTokenizer puts the space that begins a text before no text with a space of its own; GPT2Tokenizer cuts every
    text as GPT-2 does. Both pass over what the file says. What stands before and after a text is left to transformers,
    which reads ``add_bos_token`` from a second file. Definitions that differ in words alone stay as they are loaded,
    and so does the hash by which stores and maps know them.
    """
    backend, meant = tokenizer.backend_tokenizer, Tokenizer.from_file(str(path))
    meant.no_truncation()
    meant.no_padding()
    if _ids(backend) == _ids(meant):
        return
    here, there = (json.loads(one.to_str()) for one in (backend, meant))
    for part in _PARTS:
        if here[part] != there[part]:
            setattr(backend, part, getattr(meant, part))
    if _without_vocabulary(here["model"]) != _without_vocabulary(there["model"]):
        backend.model = meant.model


def _ids(backend: Tokenizer) -> list[list[int]]:
    """Ids of texts of many kinds, without what comes before and after."""
    backend.encode_special_tokens = True  # transformers sets this anew before it tokenises
    return [read.ids for read in backend.encode_batch(list(PROBES), add_special_tokens=False)]


def _without_vocabulary(model: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in model.items() if key not in ("vocab", "merges")}


def _follow_pieces(tokenizer: Any, path: Path) -> None:
    """Give a tokenizer the backend that a SentencePiece model means."""
    proto = read_pieces(path)
    if proto is None:
        return
    held, backend = tokenizer.backend_tokenizer, backend_of(proto)
    refuse_other_ids(backend, path, proto)
    for number, token in sorted(tokenizer.added_tokens_decoder.items()):
        if backend.token_to_id(token.content) is None:  # of another file than the pieces
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if backend.token_to_id(token.content) != number:
            raise ModelLoadError(
                f"its token {token.content!r} has number {number} beside tokenizer.model and "
                f"{backend.token_to_id(token.content)} in it; save a tokenizer.json that says how it is meant"
            )
    backend.post_processor = held.post_processor
    tokenizer._tokenizer = backend  # noqa: SLF001 - there is no public way to exchange it, and chat templates stay


def _start(tokenizer: Any) -> dict[str, Any] | None:
    read = tokenizer("a", return_special_tokens_mask=True, verbose=False)
    if not read["input_ids"] or not read["special_tokens_mask"][0]:
        return None
    first = int(read["input_ids"][0])
    return {"id": first, "text": str(tokenizer.convert_ids_to_tokens(first))}


def _asked(where: Mapping[str, Any], tokenizer: Any) -> str | None:
    """The start token that ``add_bos_token`` asks for.

    A ``bos_token_id`` in the configuration of the model, or a ``bos_token`` in that of the tokenizer, only names one:
    GPT-2, SmolLM2 and Llama 3 name one that no text begins with.
    """
    path = None if "gguf_file" in where else _file(where, "tokenizer_config.json")
    wanted = False
    if path is not None:
        with suppress(OSError, ValueError):  # what is wrong with the file has been said by then
            found = json.loads(path.read_text("utf-8"))
            wanted = isinstance(found, dict) and found.get("add_bos_token") is True
    return str(tokenizer.bos_token) if wanted and tokenizer.bos_token is not None else None
