"""A SentencePiece model as the backend of a fast tokenizer that gives SentencePiece's own ids.

transformers builds a backend of its own beside every type of model: with another normaliser or none, without the space
that SentencePiece puts before a text, or with it only where the text does not begin with one. Here the backend follows
the file alone: its pieces, its scores and its ``normalizer_spec``. What it gives is then compared with SentencePiece.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from featstore.errors import ModelLoadError

SPACE = "▁"
#: Kinds of pieces in the file.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
#: Kinds of models in the file that the backend has too.
_UNIGRAM, _BPE = 1, 2
#: Spaces everywhere, line feeds, marks, several scripts, characters without a piece: where normalisers differ.
PROBES = (
    *(
        "The capital of France is Paris.",
        " The",
        "  two  spaces  inside   and behind  ",
        " ",
        "\n",
        "12345 3.14 100,000",
    ),
    *("\nnew\n\n\tline\r\nend", "\u00a0no-break\u3000wide", f"{SPACE}literal {SPACE} mark{SPACE}"),
    *("def f(x):\n    return [x_1, x ** 2]\n", "café cafe\u0301 ﬁ Ａ ½ ²", "Ελληνικά, русский язык, українська"),
    *("עִבְרִית וַעֲרָבִית", "اَلْعَرَبِيَّةُ", "हिन्दी भाषा और नमस्ते दुनिया", "தமிழ் மொழி", "ภาษาไทย ทำ"),
    *("မြန်မာဘာသာ ကမ္ဘာ", "日本語の文。東京、千代田区", "한국어 문장 각", "中文句子。"),
    *("🙂👩\u200d👩\u200d👧\u200d👦 x\u200b", "\U00013000\x00\x07\ufeff", "aaaaaaaaaaaaaaa" + 40 * " " + "bbbb"),
)


def read_pieces(path: Path) -> Any | None:
    """The file's content; None where it is no SentencePiece model (Llama 3 has one of tiktoken's under the same name).

    Args:
        path: ``tokenizer.model``.
    """
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    try:
        SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        return None
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    return proto


def backend_of(proto: Any) -> Tokenizer:
    """A backend that does what the file says; nothing comes before or after a text.

    Args:
        proto: From :func:`read_pieces`.

    Raises:
        ModelLoadError: The model is of another kind than BPE and Unigram.
    """
    kind = proto.trainer_spec.model_type
    if kind not in (_UNIGRAM, _BPE):
        raise ModelLoadError(
            "its SentencePiece model is neither BPE nor Unigram; save a tokenizer.json beside tokenizer.model"
        )
    user_defined = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    backend = Tokenizer(_bpe(proto) if kind == _BPE else _unigram(proto))
    backend.normalizer = _normalizer(proto.normalizer_spec, user_defined)
    backend.decoder = _decoder(proto.normalizer_spec)
    control = [piece.piece for piece in proto.pieces if piece.type in (_UNKNOWN, _CONTROL)]
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in control])
    # SentencePiece looks for its user's pieces in the normalised text.
    backend.add_tokens([AddedToken(piece, special=False, normalized=True) for piece in user_defined])
    return backend


def refuse_other_ids(backend: Tokenizer, path: Path, proto: Any) -> None:
    """Prove on texts of many kinds that a backend gives SentencePiece's ids, with control tokens read as text.

    Args:
        backend: Of the tokenizer.
        path: The file.
        proto: Its content.

    Raises:
        ModelLoadError: It does not; the message shows a text.
    """
    from sentencepiece import SentencePieceProcessor

    truth = SentencePieceProcessor(model_file=str(path))
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        for text in (*PROBES, *_quoted(proto)):
            found, wanted = backend.encode(text, add_special_tokens=False).ids, truth.encode(text)
            if found != wanted:
                raise ModelLoadError(
                    f"its tokenizer.model cannot be read as SentencePiece reads it: {text[:30]!r} gives "
                    f"{_start(backend, found, wanted)} for {_start(backend, wanted, found)}; save a tokenizer.json "
                    "beside it that says how it is meant"
                )
    finally:
        backend.encode_special_tokens = before


def _quoted(proto: Any) -> Iterable[str]:
    """Texts that quote control tokens and the user's own pieces, those at both ends of the vocabulary.

    A backend's Unigram finds the control tokens among its pieces wherever they stand; only BPE is asked about them.
    """
    kinds = (_CONTROL, _USER_DEFINED) if proto.trainer_spec.model_type == _BPE else (_USER_DEFINED,)
    for kind in kinds:
        pieces = [piece.piece for piece in proto.pieces if piece.type == kind]
        for piece in (*pieces[:4], *pieces[-4:]):
            yield f"quoted {piece} and{piece}again"
            yield f"{piece} at the start"


def _start(backend: Tokenizer, ids: Sequence[int], others: Sequence[int]) -> str:
    """The first piece that differs."""
    at = next((i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), min(len(ids), len(others)))
    return repr(backend.id_to_token(ids[at])) if at < len(ids) else "nothing"


def _bpe(proto: Any) -> models.BPE:
    """Pairs are merged in the order of the scores of what they make."""
    vocabulary = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    mergeable = {piece.piece for piece in proto.pieces if piece.type == _NORMAL}
    made = [(i, piece.piece) for i, piece in enumerate(proto.pieces) if piece.type == _NORMAL and len(piece.piece) > 1]
    made.sort(key=lambda at: -proto.pieces[at[0]].score)
    merges = [
        (piece[:cut], piece[cut:])
        for _, piece in made
        for cut in range(1, len(piece))
        if piece[:cut] in mergeable and piece[cut:] in mergeable
    ]
    return models.BPE(
        vocab=vocabulary,
        merges=merges,
        unk_token=_unknown(proto)[1],
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _unigram(proto: Any) -> models.Unigram:
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    return models.Unigram(pieces, unk_id=_unknown(proto)[0], byte_fallback=proto.trainer_spec.byte_fallback)


def _unknown(proto: Any) -> tuple[int, str]:
    return next((i, piece.piece) for i, piece in enumerate(proto.pieces) if piece.type == _UNKNOWN)


def _normalizer(spec: Any, user_defined: Sequence[str]) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        # The backend maps graphemes, and of this one only the first character.
        steps += [normalizers.Replace("\r\n", "\n\n"), normalizers.Precompiled(spec.precompiled_charsmap)]
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(_prefix(" " if not spec.escape_whitespaces else SPACE, user_defined))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
        if spec.remove_extra_whitespaces:
            steps.append(normalizers.Replace(Regex(SPACE + r"+\z"), ""))  # also one that the text had for itself
    return normalizers.Sequence(steps)


def _prefix(space: str, user_defined: Sequence[str]) -> normalizers.Normalizer:
    """The space before a text, also before one that begins with a space.

    A backend normalises the user's own pieces too before it looks for them, so these must stay as they are.
    """
    if not user_defined:
        return normalizers.Prepend(space)
    alone = "|".join(re.sub(r"(\W)", r"\\\1", piece) for piece in user_defined)
    return normalizers.Replace(Regex(rf"\A(?!(?:{alone})\z)(?=[\s\S])"), space)


def _decoder(spec: Any) -> decoders.Decoder:
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(steps + ([decoders.Strip(content=" ", left=1)] if spec.add_dummy_prefix else []))
