"""What the attributes and the manifest of a store must say: one record for every kind of JSON object.

Members that a store of an older version lacks have defaults; what a newer version adds is let pass. Counts have bounds,
so that nothing is computed with, or allocated for, a number that no store has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from featstore.runtime.schema import Bounds, Items, Matches

#: More than any array on a disk has elements, and far from where int64 ends.
MOST = 2**48

Count = Annotated[int, Bounds(0, MOST)]
Positive = Annotated[int, Bounds(1, MOST)]
#: A model's short name, which is a directory's.
Name = Annotated[str, Matches(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", "a safe name of letters, digits, '.', '_' and '-'")]
Sha256 = Annotated[str, Matches(r"[0-9a-f]{64}", "64 hexadecimal digits")]
Crc32 = Annotated[str, Matches(r"[0-9a-f]{8}", "8 hexadecimal digits")]
#: Text that people read and nothing is done with.
Words = Annotated[str, Matches(r".{0,10000}", "text of at most 10,000 characters")]
#: Path of a file within the store: no absolute one, no way up, nothing that is not a plain name.
FilePath = Annotated[
    str,
    Matches(
        r"(?!(?:.*/)?\.\.(?:/|\Z))[A-Za-z0-9._-]{1,255}(?:/[A-Za-z0-9._-]{1,255}){0,12}",
        "a file of this store; do not trust it",
    ),
]
Versions = Mapping[str, Words]
Policy = Literal["end", "word", "byte"]


# The root -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextSource:
    """Where the text came from, as :class:`featstore.text.sources.Source`."""

    kind: Words
    location: Words | None = None
    config: Words | None = None
    split: Words = "train"
    field: Words = "text"


@dataclass(frozen=True)
class Generation:
    """How models answered the documents."""

    tokens: Positive
    #: Member ``with``, which is a keyword.
    with_: Annotated[tuple[Name, ...], Items(least=1)]
    temperature: Annotated[float, Bounds(0)]
    top_p: Annotated[float, Bounds(0, 1, exclusive=True)]
    seed: int | None = None


@dataclass(frozen=True)
class CorpusAttributes:
    """What is recorded of the text: counts, budgets, hash and form."""

    bytes: Count
    documents: Count
    windows: Count
    sha256: Sha256 | None = None
    form: Literal["text", "messages"] = "text"
    date: Words | None = None
    normalise: Literal["none", "nfc"] = "none"
    control_tokens: Literal["text", "special"] = "special"
    max_tokens: Count | None = None
    max_documents: Count | None = None
    max_document_bytes: Count | None = None
    seed: int | None = None
    source: TextSource | None = None
    generate: Generation | None = None


@dataclass(frozen=True)
class SplitCounts:
    """Documents of each split."""

    train: Count
    val: Count
    test: Count


@dataclass(frozen=True)
class SplitAttributes:
    """The rule of the splits, and what came of it."""

    documents: SplitCounts
    rule: Words = ""


@dataclass(frozen=True)
class MaskAttributes:
    """From which multiple of the median norm on a row is a sink."""

    sink_threshold: Annotated[float, Bounds(0, 1e30, exclusive=True)]


@dataclass(frozen=True)
class EncodingAttributes:
    """How the rows of a model were stored."""

    format: Words
    layout: Words
    shard_rows: Positive


@dataclass(frozen=True)
class ConversionLink:
    """What a converted store was made from; a chain of conversions is a chain of links."""

    fingerprint: Sha256
    models: Mapping[Name, EncodingAttributes]
    exact: bool
    converted_from: ConversionLink | None = None


@dataclass(frozen=True)
class RebuiltMoments:
    """Which blocks of two models a rebuild kept."""

    kept: Count
    summed: bool


@dataclass(frozen=True)
class Rebuilt:
    """What one rebuild changed."""

    changed: bool = True
    from_version: Annotated[int, Bounds(1, 1000)] = 1
    fingerprint_before: Sha256 | None = None
    fingerprint_after: Sha256 | None = None
    models: Mapping[Name, Mapping[str, Count]] = field(default_factory=dict)
    pairs: Mapping[str, Mapping[Policy, Mapping[str, Count]]] = field(default_factory=dict)
    moments: Mapping[str, RebuiltMoments] = field(default_factory=dict)


@dataclass(frozen=True)
class Rebuilding:
    """What a rebuild that is not complete has settled."""

    report: Rebuilt
    sums: Mapping[str, Words]
    tables: Mapping[Name, Words]


@dataclass(frozen=True)
class RootAttributes:
    """What the root says of the whole store."""

    format_version: Annotated[int, Bounds(1, 1000)]
    models: Annotated[tuple[Name, ...], Items(least=1, unique=True)]
    corpus: CorpusAttributes
    split: SplitAttributes
    mask: MaskAttributes
    window_bytes: Annotated[int, Bounds(1, 2**31)]
    complete: bool = False
    segments: Annotated[tuple[Count, ...], Items(rising=True)] = ()
    moments: bool = False
    site_convention: Words = ""
    plan: Words = ""
    converted_from: ConversionLink | None = None
    rebuilt: tuple[Rebuilt, ...] = ()
    rebuilding: bool | Rebuilding = False


# A model --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StartToken:
    """The token that a tokenizer puts before a text."""

    id: Count
    text: Words


@dataclass(frozen=True)
class Addition:
    """Layers that were added later, and with what."""

    layers: Annotated[tuple[Count, ...], Items(least=1, unique=True)]
    versions: Versions
    device_type: Words


@dataclass(frozen=True)
class Adapter:
    """The adapter that was applied to the weights."""

    type: Words
    base: Words
    r: Count | None = None
    lora_alpha: float | None = None
    target_modules: tuple[Words, ...] | Words | None = None


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint is quantised."""

    method: Words
    bits: Count | None = None
    dequantized: bool = False


@dataclass(frozen=True)
class ModelAttributes:
    """What is recorded of a model: the shape of its states, where it came from, and what it was run with."""

    depth: Annotated[int, Bounds(0, 100_000)]
    width: Annotated[int, Bounds(1, 2**24)]
    rows: Count
    layers: Annotated[tuple[Count, ...], Items(least=1, unique=True)]
    reference: Words | None = None
    revision: Words | None = None
    family: Words | None = None
    format: Literal["bfloat16", "float16", "float32", "int8", "fp8"] | None = None
    layout: Literal["hot", "archive"] | None = None
    shard_rows: Positive | None = None
    states: Literal["rows", "moments"] = "rows"
    layer_0: Literal["stored", "table"] = "stored"
    vocabulary: Positive | None = None
    start_token: StartToken | None = None
    start_token_asked: Words | None = None
    byte_ends: Literal["bytes", "offsets"] | None = None
    batch_tokens: Positive | None = None
    compute_dtype: Words | None = None
    device_type: Words | None = None
    attention: Words | None = None
    site_convention: Words = ""
    config_sha256: Sha256 | None = None
    tokenizer_sha256: Words | None = None
    tokens_sha256: Words | None = None
    chat_template_sha256: Words | None = None
    weights_fingerprint: Words | None = None
    weights_sample: Words | None = None
    versions: Versions = field(default_factory=dict)
    additions: tuple[Addition, ...] = ()
    adapter: Adapter | None = None
    quantization: Quantization | None = None
    verified: dict[str, Any] | None = None


# Pairs ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairAttributes:
    """What is recorded of a pair index."""

    policy: Policy
    pairs: Count
    coverage: Mapping[Name, Annotated[float, Bounds(0, 1)]]


# The manifest ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What a unit's entry in the manifest records beside its files; checked with these by ``parse_entry``."""

    rows: Count | None = None
    basis: Words | None = None
    sha256: Sha256 | None = None
    attributes: Sha256 | None = None
    index: Crc32 | None = None
