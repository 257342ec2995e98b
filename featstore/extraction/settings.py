"""Extraction settings: everything `featstore extract` accepts, by flag name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from featstore.models.references import DEFAULT_LAYERS, DEFAULT_MODELS, Allowed
from featstore.store.moments.stored import MEMORY
from featstore.text.plan import DEFAULT_BATCH_TOKENS, DEFAULT_SHARD_ROWS, DEFAULT_WINDOW_BYTES

if TYPE_CHECKING:
    from featstore.models.devices import DeviceMap


@dataclass(frozen=True)
class Settings:
    """The options of `featstore extract`. Field names are the flags.

    Attributes:
        model: ``NAME=REF`` values.
        layers: ``--layers`` values.
        dataset: Text source.
        text_field: Field of JSON lines and hub rows.
        store: Where to write.
        max_tokens: Budget per model, None for all.
        max_documents: Documents at most.
        max_document_bytes: Bytes of each document at most.
        window_bytes: Window length.
        batch_tokens: Padded tokens of a forward pass.
        shard_rows: Rows of a shard.
        form: Element format.
        layout: ``hot`` or ``archive``.
        sink_threshold: Norm over median beyond which a token is a sink.
        device: Where to run.
        dtype: Compute dtype.
        device_map: Where the modules of models go, instead of one device.
        attention: One of :data:`~featstore.models.attention.ATTENTIONS`; ``auto`` for sdpa where a model has it, else
            its own.
        normalise: ``none``, ``nfc`` or ``auto``: what the text is brought into before anything else is done with it.
        control_tokens: What control tokens that the text quotes are read as: ``text``, or ``special``.
        seed: Order in which documents are taken; 0 is corpus order. Also the seed of sampled answers.
        generate: Tokens at most that models write after each document before it is read; 0 for none.
        generate_with: Models that do; each of them where none is named.
        temperature: Of what they write; 0 takes the likeliest token each time.
        top_p: They draw from the fewest likeliest tokens that together have this probability.
        layer_0: ``stored`` as rows like any other layer, or ``table``: one row for every token id that occurs.
        yes: Use models and text that a store's or a run's own files name, though the user did not.
        allow_pickle_weights: Read pickled weights of models that have no others.
        moments: ``none``, ``add`` (beside the rows) or ``only`` (no rows).
        moments_memory: Bytes that summing moments may take.
        given: Fields that were typed; the others are taken from a store that exists. None means all.
    """

    model: tuple[str, ...] = DEFAULT_MODELS
    layers: tuple[str, ...] = (DEFAULT_LAYERS,)
    dataset: str = "wikitext-103-raw-v1"
    text_field: str = "text"
    store: Path = Path("wt103.zarr")
    max_tokens: int | None = 1_000_000
    max_documents: int | None = None
    max_document_bytes: int | None = None
    window_bytes: int = DEFAULT_WINDOW_BYTES
    batch_tokens: int = DEFAULT_BATCH_TOKENS
    shard_rows: int = DEFAULT_SHARD_ROWS
    form: str = "bfloat16"
    layout: str = "hot"
    sink_threshold: float = 5.0
    device: str = "auto"
    device_map: DeviceMap | None = None
    dtype: str = "auto"
    attention: str = "auto"
    normalise: str = "auto"
    control_tokens: str = "text"
    seed: int = 0
    generate: int = 0
    generate_with: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    layer_0: str = "stored"
    yes: bool = False
    allow_pickle_weights: bool = False
    moments: str = "none"
    moments_memory: int = MEMORY
    given: frozenset[str] | None = None

    @property
    def allowed(self) -> Allowed:
        """What may be done with what files say and hold."""
        return Allowed(self.yes, self.allow_pickle_weights)

    def was_given(self, name: str) -> bool:
        """Whether a field was typed rather than left to its default.

        Args:
            name: Field name.
        """
        return self.given is None or name in self.given
