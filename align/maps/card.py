"""What ``adapter.json`` holds, the card of a run: which maps there are, and what they were fitted to.

A run directory is handed around, so a card is read as a stranger's: what does not fit itself is refused by name before
a map is applied or a model looked for. Cards of earlier versions lack members, and read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from align.layers import LayerPair
from align.maps.registry import formulas, map_types
from featstore.errors import AdapterError, CorruptDataError
from featstore.models.references import is_name
from featstore.models.verdict import Verdict
from featstore.runtime.provenance import parse_json
from featstore.runtime.records import (
    EMPTY,
    Amount,
    Fault,
    Flag,
    Number,
    Part,
    Positive,
    Record,
    Size,
    Table,
    Whole,
    parsed,
    retold,
)
from featstore.runtime.schema import shown
from featstore.store.read.pairs import POLICIES
from featstore.text.roles import ROLES

CARD_VERSION = 1
#: What to do about a damaged run.
REMEDY = "the run is damaged: restore it or train it again"


class CardSource(Record):
    """The layer, or layers end to end, whose states a map takes.

    Attributes:
        model: Its name in the run.
        layer: The layer; of a joint map the last one.
        layers: All of them, in the order of the map's x; absent in files from before there were joint maps.
        width: Of all of them together.
    """

    always: ClassVar[tuple[str, ...]] = ("model", "layer", "width")

    model: str = ""
    layer: Whole = 0
    layers: tuple[Whole, ...] = ()
    width: Size = 1

    @property
    def in_order(self) -> tuple[int, ...]:
        """The layers, also of a card that names only one."""
        return self.layers if self.has("layers") else (self.layer,)

    def faults(self) -> Iterator[Fault]:
        """A name, layers or a last layer that cannot be."""
        yield from _name_faults(self.model)
        if not self.in_order or len(set(self.in_order)) < len(self.in_order):
            yield ("layers",), f"is {list(self.layers)}, expected layers of which each stands there once"
        elif self.layer != self.in_order[-1]:
            yield ("layer",), f"is {self.layer}, expected the last of layers, {self.in_order[-1]}"


class CardTarget(Record):
    """The layer whose states a map predicts.

    Attributes:
        model: Its name in the run.
        layer: The layer.
        width: Of its states.
    """

    always: ClassVar[tuple[str, ...]] = ("model", "layer", "width")

    model: str = ""
    layer: Whole = 0
    width: Size = 1

    def faults(self) -> Iterator[Fault]:
        """A name that cannot be."""
        yield from _name_faults(self.model)


class CardParameters(Record):
    """How large a map is.

    Attributes:
        trainable: Numbers that were fitted.
        shipped: Numbers that applying the map needs.
    """

    trainable: Whole | None = None
    shipped: Whole | None = None


class CardLayout(Record):
    """How the latents of a map of windows are used.

    Attributes:
        latents: Latents of a window.
        latent_dim: Numbers of a latent.
        stride: Most source tokens of a group.
        positions: Whether each group's end is sent.
    """

    always: ClassVar[tuple[str, ...]] = ("latents", "latent_dim", "stride", "positions")

    latents: Size = 1
    latent_dim: Size = 1
    stride: Size = 1
    positions: Flag = False


class CardOptions(Record):
    """How a map was fitted; which members there are depends on its type. ``lambda``, the ridge, is one of them.

    Attributes:
        solver: ``adamw`` of a trained map.
        lr: Peak learning rate.
        scale: Factor of a rotation.
        skip: The fixed map that it is added to.
        skip_scale: Factor of that one.
        rank: Of the update.
        alpha: Scale of a LoRA.
        components: Principal components within which it rotates.
        gram_min: Smallest eigenvalue of the source's centred Gram matrix.
        gram_max: Largest one.
        shared: Layer pairs that share the map.
        layout: How the latents of a map of windows are used.
        unit: Root mean variance of the target, of a map of windows.
        width: Of its hidden layers.
        depth: Of its decoder.
        seed: Of its initial weights.
    """

    solver: str | None = None
    lr: Positive | None = None
    scale: Number | None = None
    skip: str | None = None
    skip_scale: Number | None = None
    rank: Whole | None = None
    alpha: Number | None = None
    components: Whole | None = None
    gram_min: Number | None = None
    gram_max: Number | None = None
    shared: Whole | None = None
    layout: CardLayout | None = None
    unit: Positive | None = None
    width: Size | None = None
    depth: Whole | None = None
    seed: Whole | None = None

    def faults(self) -> Iterator[Fault]:
        """A factor of 0, which no rotation has, or a ridge that is no number from 0 on."""
        for name in ("scale", "skip_scale"):
            if self.has(name) and getattr(self, name) == 0:
                yield (name,), "is 0, expected a factor other than 0"
        ridge = (self.model_extra or {}).get("lambda")
        if isinstance(ridge, bool) or not isinstance(ridge, int | float | None) or (ridge is not None and ridge < 0):
            yield ("lambda",), f"is {shown(ridge)}, expected a number from 0 on"


class CardPair(Record):
    """One map.

    Attributes:
        key: Name of the map and of its tensors.
        kind: Of its formula: ``linear``, ``mlp`` or ``compress``; absent in files from before there were others than
            linear ones.
        source: What it takes.
        target: What it gives.
        parameters: How large it is.
        options: How it was fitted.
    """

    always: ClassVar[tuple[str, ...]] = ("key", "source", "target")

    key: str = ""
    kind: str = "linear"
    source: CardSource = CardSource()
    target: CardTarget = CardTarget()
    parameters: CardParameters = CardParameters()
    options: CardOptions = CardOptions()

    @property
    def pair(self) -> LayerPair:
        """Which layers."""
        return LayerPair(self.source.model, self.source.in_order, self.target.model, self.target.layer)

    def faults(self) -> Iterator[Fault]:
        """A key that names other layers, or a kind that this version does not know."""
        if self.key != self.pair.key:
            yield ("key",), f"is {shown(self.key)}, expected {self.pair.key} by its source and target"
        if self.kind not in formulas():
            yield ("kind",), f"is {shown(self.kind)}, expected one of {', '.join(formulas())} (or upgrade)"


class CardStart(Record):
    """The token with which a model's texts begin.

    Attributes:
        id: Its number.
        text: As the tokenizer writes it.
    """

    id: Whole | None = None
    text: str | None = None


class CardModel(Record):
    """One of the models whose states were mapped, as its store describes it.

    Attributes:
        reference: Hub id, directory or GGUF file that it was read from; null for states made elsewhere.
        revision: Hub revision.
        family: Its type, as its configuration says.
        depth: Number of its blocks.
        width: Of its states.
        rows: Token states in the store.
        layers: Layers in the store.
        layer_0: ``table`` or ``stored``.
        states: ``rows`` or ``moments``.
        format: Number type of the store.
        layout: Of the store's shards.
        shard_rows: Rows of a shard.
        batch_tokens: Tokens of a pass.
        byte_ends: What the ends of tokens came from.
        compute_dtype: Number type of the passes.
        device_type: Where they ran.
        attention: Implementation of attention that ran.
        vocabulary: Token ids.
        start_token: The token that texts begin with; null for none.
        config_sha256: Of its configuration.
        tokenizer_sha256: Of its tokenizer.
        tokens_sha256: Of its token table.
        weights_fingerprint: Of its weights.
        weights_sample: Of a sample of them.
        chat_template_sha256: Of its chat template.
        site_convention: What a layer's number means.
        median_norm: Median norm of its states, by layer.
        verified: What was tested on it.
        versions: Of the libraries that ran it.
    """

    reference: str | None = None
    revision: str | None = None
    family: str | None = None
    depth: Size | None = None
    width: Size | None = None
    rows: Whole | None = None
    layers: tuple[Whole, ...] | None = None
    layer_0: str | None = None
    states: str | None = None
    format: str | None = None
    layout: str | None = None
    shard_rows: Size | None = None
    batch_tokens: Whole | None = None
    byte_ends: str | None = None
    compute_dtype: str | None = None
    device_type: str | None = None
    attention: str | None = None
    vocabulary: Whole | None = None
    start_token: CardStart | None = None
    config_sha256: str | None = None
    tokenizer_sha256: str | None = None
    tokens_sha256: str | None = None
    weights_fingerprint: str | None = None
    weights_sample: str | None = None
    chat_template_sha256: str | None = None
    site_convention: str | None = None
    median_norm: Table[Amount] = EMPTY
    verified: Verdict | None = None
    versions: Table[str] = EMPTY

    def faults(self) -> Iterator[Fault]:
        """Layers that the model does not have."""
        for name in self.median_norm:
            layer = int(name) if name.isascii() and name.isdecimal() and len(name) < 10 else None
            if layer is None or (self.depth is not None and layer > self.depth) or name != str(layer):
                yield ("median_norm",), f"names layer {shown(name)}, expected 0 to {self.depth or 'the depth'}"
        if self.layers is not None and self.depth is not None and any(k > self.depth for k in self.layers):
            yield ("layers",), f"is {shown(list(self.layers))}, expected layers of 0 to {self.depth}"


class CardStore(Record):
    """The store that the maps were fitted from.

    Attributes:
        path: Where it lay.
        fingerprint: Of its contents.
    """

    path: str | None = None
    fingerprint: str | None = None


class CardOrigin(Record):
    """Where text came from.

    Attributes:
        kind: Such as ``jsonl``.
        location: File, directory or hub id.
        split: Of a dataset.
        field: Of a document that holds its text.
    """

    kind: str | None = None
    location: str | None = None
    split: str | None = None
    field: str | None = None


class CardCorpus(Record):
    """The text that the models read.

    Attributes:
        source: Where it came from.
        documents: Their number.
        windows: Pieces of documents that were read each by itself.
        window_bytes: The most bytes of one, in cards of early versions.
        bytes: Of all documents.
        sha256: Of all documents.
        form: ``text`` or ``messages``.
        control_tokens: Whether control tokens in a text are read as what they stand for: ``text`` or ``tokens``.
        normalise: Unicode form.
        seed: Of the choice of documents.
    """

    source: CardOrigin | None = None
    documents: Whole | None = None
    windows: Whole | None = None
    window_bytes: Size | None = None
    bytes: Whole | None = None
    sha256: str | None = None
    form: str | None = None
    control_tokens: str = "text"
    normalise: str | None = None
    seed: Whole | None = None


class CardMask(Record):
    """How attention sinks are told.

    Attributes:
        sink_threshold: Multiple of the median norm beyond which a state is one.
        keep_sinks: Whether the maps were fitted with them.
    """

    sink_threshold: Positive | None = None
    keep_sinks: Flag | None = None


class CardProvenance(Record):
    """What the run was made with.

    Attributes:
        versions: Of libraries that can change a number.
        seed: Of every choice at random.
    """

    versions: Table[str] = EMPTY
    seed: Whole | None = None


class Card(Record):
    """Contents of ``adapter.json``: which maps a run has, and what they were fitted to.

    Attributes:
        format: Version of this file, 1.
        type: The run's type of map.
        pairs: The maps.
        models: The models of the maps, by name.
        store: The store that the maps were fitted from.
        corpus: Its text.
        window_bytes: The most bytes of a window of it.
        pair_policy: Which tokens of the two models are a pair: ``end``, ``word`` or ``byte``.
        roles: The roles whose rows the maps were fitted to; null for all.
        coverage: Share of each model's tokens that have a partner.
        mask: How attention sinks are told.
        normalisation: Whether train means are subtracted.
        shared: Numbers that the maps ship together, with ``--shared``.
        provenance: What the run was made with.
    """

    file: ClassVar[str] = "adapter.json"
    made_by: ClassVar[str] = "align train"
    always: ClassVar[tuple[str, ...]] = ("format", "pairs")

    format: Whole = CARD_VERSION
    type: str | None = None
    pairs: tuple[CardPair, ...] = ()
    models: Table[CardModel] = EMPTY
    store: CardStore = CardStore()
    corpus: CardCorpus = CardCorpus()
    window_bytes: Size | None = None
    pair_policy: str | None = None
    roles: tuple[str, ...] | None = None
    coverage: Table[Part] = EMPTY
    mask: CardMask = CardMask()
    normalisation: str | None = None
    shared: CardParameters | None = None
    provenance: CardProvenance = CardProvenance()

    def faults(self) -> Iterator[Fault]:
        """A type, policy or role that is unknown, maps with one key, and maps that do not fit their models."""
        types = {type_.name: type_ for type_ in map_types()}
        if self.type is not None and self.type not in types:
            yield ("type",), f"is {shown(self.type)}, expected one of {', '.join(types)} (or upgrade)"
        if self.pair_policy is not None and self.pair_policy not in POLICIES:
            yield ("pair_policy",), f"is {shown(self.pair_policy)}, expected one of {', '.join(POLICIES)}"
        for number, role in enumerate(self.roles or ()):
            if role not in ROLES:
                yield ("roles", number), f"is {shown(role)}, expected one of {', '.join(ROLES)}"
        yield from (
            (("models",), f"has a model {shown(name)}, expected a model's name")
            for name in self.models
            if not is_name(name)
        )
        keys = set[str]()
        for number, each in enumerate(self.pairs):
            if each.key in keys:
                yield ("pairs", number, "key"), f"is {shown(each.key)}, expected a key of its own"
            keys.add(each.key)
            if self.type in types and each.kind != types[self.type].formula.kind:
                yield ("pairs", number, "kind"), f"is {shown(each.kind)}, expected that of a {self.type} map"
            if self.has("models"):
                sides = (("source", each.source.model, each.source.in_order, each.source.width),
                         ("target", each.target.model, (each.target.layer,), each.target.width))  # fmt: skip
                for side, model, layers, width in sides:
                    for inner, words in self._unlike(model, layers, width):
                        yield ("pairs", number, side, *inner), words

    def _unlike(self, name: str, layers: tuple[int, ...], width: int) -> Iterator[Fault]:
        """What a map says of a model that the model's own entry does not."""
        if name not in self.models:
            yield ("model",), f"is {shown(name)}, expected one of {', '.join(map(shown, self.models)) or 'no model'}"
            return
        model = self.models[name]
        if model.depth is not None and any(layer > model.depth for layer in layers):
            yield ("layer",), f"is {max(layers)}, expected 0 to {model.depth}, the depth of {name}"
        if model.width is not None and width != model.width * len(layers):
            yield ("width",), f"is {width}, expected {model.width * len(layers)} by the width of {name}"
        missing = [layer for layer in layers if str(layer) not in model.median_norm]
        if model.has("median_norm") and missing:
            yield ("layer",), f"is {missing[0]}, expected a layer that has a median norm"


def _name_faults(name: str) -> Iterator[Fault]:
    if not is_name(name):
        yield ("model",), f"is {shown(name)}, expected a model's name: letters, digits, '.', '-' and single '_'"


def read_card(directory: Path) -> Card:
    """Read a run directory's card.

    Args:
        directory: Run directory.

    Raises:
        AdapterError: There is none, it is of a newer format, or it is damaged; the message names the member.
    """
    path = directory / Card.file
    if not path.is_file():
        raise AdapterError(f"no maps in {str(directory)!r}: it has no adapter.json; make one with `align train`")
    try:
        data = path.read_bytes()
        version = parse_json(data, str(path)).get("format")
        # Before anything else: of a newer one the rest may mean something else.
        if isinstance(version, bool) or version != CARD_VERSION:
            raise AdapterError(f"{path} has format {shown(version)}, this version reads {CARD_VERSION}; upgrade")
        return parsed(Card, data, str(path), remedy=REMEDY)
    except OSError as error:
        raise AdapterError(f"{path} cannot be read ({error.strerror}); {REMEDY}") from error
    except CorruptDataError as error:
        raise retold(error, AdapterError, REMEDY) from error
