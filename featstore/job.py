"""What an extraction was asked to do, resolved against the models and the text before any state is computed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from featstore import corpus, formats, models, spec, tokens
from featstore.console import progress
from featstore.errors import SpecError
from featstore.plan import (
    DEFAULT_BATCH_TOKENS,
    DEFAULT_SHARD_ROWS,
    DEFAULT_WINDOW_BYTES,
    Plan,
    make_plan,
)


@dataclass(frozen=True)
class Settings:
    """Everything `featstore extract` can be told. Field names are the flags.

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
        attention: transformers' attention implementation.
        seed: Order in which documents are taken; 0 is corpus order.
    """

    model: tuple[str, ...] = spec.DEFAULT_MODELS
    layers: tuple[str, ...] = (spec.DEFAULT_LAYERS,)
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
    dtype: str = "auto"
    attention: str = "sdpa"
    seed: int = 0


@dataclass(frozen=True)
class Job:
    """Settings resolved against the models and the text: all that is decided before a state is computed.

    Attributes:
        settings: As given.
        infos: Model facts by name.
        layers: Layers by model.
        plan: Windows, rows, batches.
    """

    settings: Settings
    infos: dict[str, models.ModelInfo]
    layers: dict[str, tuple[int, ...]]
    plan: Plan

    def state_bytes(self) -> int:
        """Bytes of all states at their stored width, uncompressed."""
        size = formats.parse_format(self.settings.form).storage.itemsize
        return sum(
            self.plan.models[name].rows * len(self.layers[name]) * (info.width * size + 4)
            for name, info in self.infos.items()
        )


def prepare(settings: Settings, *, quiet: bool = False) -> Job:
    """Load configurations and tokenizers, check every flag, read the text and make the plan. Writes nothing.

    Args:
        settings: As given.
        quiet: No progress.

    Raises:
        FeatstoreError: Anything wrong with models, layers, text or flags.
    """
    formats.parse_format(settings.form)
    layout = formats.parse_layout(settings.layout)
    if settings.shard_rows < 1 or settings.shard_rows % layout.chunk_rows:
        raise SpecError(
            f"--shard-rows {settings.shard_rows}: layout {layout.name} needs a multiple of {layout.chunk_rows}"
        )
    source = corpus.parse_source(settings.dataset, settings.text_field)
    infos = {s.name: models.inspect_model(s) for s in spec.parse_models(settings.model)}
    layers = spec.parse_layers(settings.layers, {name: info.depth for name, info in infos.items()})
    for name, info in infos.items():
        tokens.probe(info.tokenizer, name)
    documents = corpus.documents(
        corpus.shuffled(corpus.iter_texts(source), settings.seed),
        max_documents=settings.max_documents,
        max_bytes=settings.max_document_bytes,
    )
    with progress("tokenise", settings.max_tokens, "tok", quiet=quiet) as tick:
        plan = make_plan(
            documents,
            {name: info.tokenizer for name, info in infos.items()},
            max_tokens=settings.max_tokens,
            window_bytes=settings.window_bytes,
            batch_tokens=settings.batch_tokens,
            shard_rows=settings.shard_rows,
            contexts={name: info.context for name, info in infos.items()},
            settings={
                "source": source.to_dict(),
                "max_tokens": settings.max_tokens,
                "max_documents": settings.max_documents,
                "max_document_bytes": settings.max_document_bytes,
                "seed": settings.seed,
            },
            tick=tick,
        )
    return Job(settings, infos, layers, plan)
