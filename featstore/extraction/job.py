"""What an extraction was asked to do, resolved against the models and the text before any state is computed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from featstore.errors import SpecError, StoreStateError
from featstore.extraction.asking import asking, generation_of, held_answers, writers
from featstore.extraction.compute import Compute
from featstore.extraction.generating import Answering
from featstore.extraction.named import vouch_for
from featstore.extraction.proof import measured, verdicts
from featstore.extraction.recorded import TEXT_FIELDS, Recorded, inherit, read_recorded
from featstore.extraction.settings import Settings
from featstore.models import loading as models
from featstore.models import references as spec
from featstore.models.adapters import with_bases
from featstore.models.attention import AUTO, parse_attention
from featstore.models.devices import check_models
from featstore.models.skeletons import choose_attention
from featstore.models.tokenizers import check_control_tokens, start_missing
from featstore.models.trust import remember, vouch_for_text
from featstore.models.verdict import Verdict
from featstore.runtime.console import err, progress
from featstore.runtime.provenance import read_json
from featstore.store.format.elements import parse_format
from featstore.store.format.encoding import Encoding
from featstore.store.format.packed import most_bytes
from featstore.store.format.shards import parse_layout
from featstore.store.moments.stored import SPLITS
from featstore.store.write.space import free_bytes
from featstore.text import tokens
from featstore.text.chat import DATE
from featstore.text.documents import documents
from featstore.text.normalisation import check_choice, normalised, normalises
from featstore.text.plan import Plan, PlannedCorpus
from featstore.text.planning import make_plan, plan_model
from featstore.text.sources import Source, iter_texts, parse_source, shuffled


@dataclass(frozen=True)
class Job:
    """Settings resolved against the models, the text and the store: all that is decided before a state is computed.

    Attributes:
        store: Where to write.
        infos: Facts of the models to run, by name.
        layers: Layers that each of them will have.
        plan: Windows, rows, batches.
        encoding: Element format, layout and shard length of rows.
        compute: How models are run.
        table: Whether layer 0 is a table.
        sink_threshold: Norm over median beyond which a token is a sink.
        moments: ``none``, ``add`` (beside the rows) or ``only`` (no rows).
        moments_memory: Bytes that summing moments may take.
        recorded: What the store says about itself, or None where there is none yet.
        verdicts: What was found out about the models by running them; one on which nothing was is left out.
        unanswered: Documents of the plan whose answers are still to be generated; of an estimate alone.
    """

    store: Path
    infos: dict[str, models.ModelInfo]
    layers: dict[str, tuple[int, ...]]
    plan: Plan
    encoding: Encoding
    compute: Compute
    table: bool
    sink_threshold: float
    moments: str
    moments_memory: int
    recorded: Recorded | None = None
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    unanswered: int = 0

    def row_layers(self, name: str) -> tuple[int, ...]:
        """Layers stored row by row: all but a layer 0 that is a table; none where only moments are kept.

        Args:
            name: Model.
        """
        if self.moments == "only":
            return ()
        return tuple(k for k in self.layers[name] if k or not self.table)

    def layer_bytes(self, name: str) -> int:
        """Bytes of one layer stored row by row, uncompressed.

        Args:
            name: Model.
        """
        return self.plan.models[name].rows * self.encoding.form.bytes_per_row(self.infos[name].hidden)

    def table_bytes(self, name: str) -> int:
        """Bytes of a layer 0 that is a table, or 0 where there is none.

        Args:
            name: Model.
        """
        if 0 not in self.layers[name] or not self.table or self.moments == "only":
            return 0
        return len(np.unique(self.plan.models[name].ids)) * self.encoding.form.bytes_per_row(self.infos[name].hidden)

    def moment_bytes(self) -> int:
        """Bytes of the moments of every two models, and of the norms where they are all that is left of the rows."""
        if self.moments == "none":
            return 0
        total = 0
        for first, second in combinations(self.infos, 2):
            widths = [self.infos[name].hidden for name in (first, second) for _ in self.layers[name]]
            whole = sum(most_bytes((a, b), half=False) for a, b in combinations(widths, 2))
            total += len(SPLITS) * (whole + sum(most_bytes((a, a), half=True) for a in widths))
        if self.moments == "only":
            total += sum(4 * self.plan.models[name].rows * len(self.layers[name]) for name in self.infos)
        return total

    def state_bytes(self) -> int:
        """Bytes of all states, uncompressed."""
        return sum(len(self.row_layers(n)) * self.layer_bytes(n) + self.table_bytes(n) for n in self.infos)

    def bytes_to_write(self) -> int:
        """Bytes of the states that an earlier run has not committed yet, uncompressed."""
        total = self.moment_bytes()
        for name in self.infos:
            rows = max(self.plan.models[name].rows, 1)
            total += self.table_bytes(name)
            for layer in self.row_layers(name):
                document = self.store / "models" / name / "resid" / str(layer) / "zarr.json"
                shape = read_json(document).get("shape") if document.is_file() else None
                done = shape[0] if isinstance(shape, list) and shape and isinstance(shape[0], int) else 0
                total += self.layer_bytes(name) * max(rows - done, 0) // rows
        return total

    def space_remedy(self) -> str:
        """The flags that would make it fit, for messages."""
        if self.moments == "only":
            return "fewer --layers, or another disk with --store"
        per_token = self.state_bytes() / max(1, *(m.rows for m in self.plan.models.values()))
        fit = int(free_bytes(self.store) / per_token * 0.95)
        return f"--max-tokens {fit} would fit, or fewer --layers, or another disk with --store"


def prepare(settings: Settings, *, quiet: bool = False, load: bool = True, typed: bool = True) -> Job:
    """Load configurations and tokenizers, check every flag, test new models, read the text and make the plan.

    Nothing is written to the store.

    Args:
        settings: As given.
        quiet: No progress.
        load: Load models that have not been tested yet even if that means to download them; without it the
            configurations of such models are believed.
        typed: The models and the text that are given were typed by the user, who is not asked about them again; without
            it, they were vouched for before.

    Raises:
        StrangeReferenceError: The store names a model or a text that is needed and that the user has not named.
        FeatstoreError: Anything wrong with models, layers, text, flags or the store that is there.
    """
    check_choice(settings.normalise)
    recorded = read_recorded(settings.store)
    named = settings.model if recorded is None or settings.was_given("model") else ()
    if recorded:
        settings = inherit(settings, recorded)
    if settings.moments not in ("none", "add", "only"):
        raise SpecError(f"moments {settings.moments!r}: choose none, add or only")
    if settings.moments == "only" and recorded:
        # Moments are of two models at a time: one that joins is summed with each of the others.
        joining = {text.partition("=")[0] for text in settings.model}
        kept = [text for name, text in recorded.references().items() if name not in joining]
        settings = replace(settings, model=(*kept, *settings.model))
    if recorded:
        theirs = [text for text in recorded.references().values() if text in settings.model and text not in named]
        vouch_for(theirs, settings.store, settings.allowed, quiet=quiet)
    encoding = Encoding(parse_format(settings.form), parse_layout(settings.layout), settings.shard_rows)
    chunk = encoding.layout.chunk_rows
    if encoding.shard_rows < 1 or encoding.shard_rows % chunk:
        raise SpecError(
            f"--shard-rows {encoding.shard_rows}: layout {encoding.layout.name} needs a multiple of {chunk}"
        )
    if settings.layer_0 not in ("stored", "table"):
        raise SpecError(f"--layer-0 {settings.layer_0!r}: choose stored or table")
    source = parse_source(settings.dataset, settings.text_field)
    check_control_tokens(settings.control_tokens)
    _refuse_other_control_tokens(settings, recorded)
    specs = spec.parse_models(settings.model, settings.allowed)
    infos = {one.name: models.inspect_model(one, settings.control_tokens) for one in specs}
    if typed:
        own_text = recorded is None or settings.was_given("dataset")
        own = [one for text, one in zip(settings.model, specs, strict=True) if text in named]
        remember(with_bases(own), text=source if own_text else None, quiet=quiet)
    for name, info in infos.items():
        missing = start_missing(name, info.start_token, info.start_token_asked)
        if missing and not quiet:
            err.print(missing)
    if settings.normalise == "auto":
        any_does = any(normalises(info.tokenizer) for info in infos.values())
        settings = replace(settings, normalise="nfc" if any_does else "none")
    settings = replace(settings, generate_with=writers(settings, infos, recorded))
    claimed = {name: info.depth for name, info in infos.items() if info.depth is not None}
    if settings.was_given("layers") and len(claimed) == len(infos):
        spec.parse_layers(settings.layers, claimed)  # what cannot be right is said before the wait for the weights
    for name, info in infos.items():
        if not tokens.prove(info.tokenizer, name).told and not quiet:
            err.print(
                f"model {name!r}: its tokens' bytes cannot be told, so byte ends are those of its offsets, and a token "
                "that shares a character with the next one does not pair"
            )
    compute = _compute(settings, infos, recorded)
    found = verdicts(infos, compute, recorded, table=settings.layer_0 == "table", quiet=quiet, load=load)
    infos = {name: measured(info, found.get(name)) for name, info in infos.items()}
    depths = {name: info.blocks for name, info in infos.items()}
    held = {name: a["layers"] for name, a in recorded.models.items()} if recorded else {}
    texts = settings.layers if settings.was_given("layers") else _held_layers(settings.layers, held, infos)
    wanted = spec.parse_layers(texts, depths)
    stored = {name: numbers for name, numbers in held.items() if recorded and recorded.begun(name)}
    layers = {name: tuple(sorted({*wanted[name], *stored.get(name, ())})) for name in infos}
    if settings.moments == "only" and len(infos) < 2:
        raise SpecError("--moments-only sums over pairs of two models; name a second one with --model")
    models_asked = asking(settings, compute, recorded, found, load=load, quiet=quiet)
    plan = _plan(settings, source, infos, recorded, models_asked, quiet=quiet)
    if models_asked:
        models_asked.say()
    for name, info in infos.items():
        # The store's tokens under a name that another model has now are refused as such, when the job is compared.
        known = recorded.models.get(name, {}).get("tokenizer_sha256") if recorded else None
        if known in (None, info.tokenizer_hash):
            models.refuse_unknown_ids(info, plan.models[name].ids)
    return Job(
        store=settings.store,
        infos=infos,
        layers=layers,
        plan=plan,
        encoding=encoding,
        compute=compute,
        table=settings.layer_0 == "table",
        sink_threshold=settings.sink_threshold,
        moments=settings.moments,
        moments_memory=settings.moments_memory,
        recorded=recorded,
        verdicts=found,
        unanswered=min(models_asked.unanswered, len(plan.corpus.document_id)) if models_asked else 0,
    )


def _refuse_other_control_tokens(settings: Settings, recorded: Recorded | None) -> None:
    """Other ids of the same text would come out, which the text does not tell."""
    if recorded is None or recorded.empty:
        return
    used = recorded.settings()["control_tokens"]
    if settings.control_tokens != used:
        raise StoreStateError(
            f"{recorded.path} was made with --control-tokens {used}; leave the flag out, or choose another --store for "
            f"{settings.control_tokens}"
        )


def _compute(settings: Settings, infos: dict[str, models.ModelInfo], recorded: Recorded | None) -> Compute:
    """How models are run; whatever is wrong with that is said before a store is begun."""
    check_models(settings.device_map, infos)
    attention = {name: _attention(settings, info, recorded) for name, info in infos.items()}
    compute = Compute(settings.device, settings.dtype, settings.device_map, attention)
    for name, info in infos.items():
        models.check_place(info.spec, compute.placement(name))
        compute.dtype_of(name)
    return compute


def _attention(settings: Settings, info: models.ModelInfo, recorded: Recorded | None) -> str:
    """What was typed; else what the store says that this model ran, or its models did; else the model's own."""
    if parse_attention(settings.attention, "--attn") != AUTO:
        return choose_attention(info.spec, settings.attention)
    held, name = recorded.attention() if recorded else {}, info.spec.name
    if recorded and name in held and recorded.begun(name):
        return held[name]
    agreed = {held[name]} if name in held else set(held.values())
    for one in agreed if len(agreed) == 1 else ():
        with suppress(SpecError):
            return choose_attention(info.spec, one)
    return choose_attention(info.spec)


def _held_layers(
    default: tuple[str, ...], held: dict[str, list[int]], infos: dict[str, models.ModelInfo]
) -> tuple[str, ...]:
    """Layers in the store for models that are in it, the default for others."""
    return (*default, *(f"{name}={','.join(map(str, held[name]))}" for name in infos if name in held))


def _plan(
    settings: Settings,
    source: Source,
    infos: dict[str, models.ModelInfo],
    recorded: Recorded | None,
    asked: Answering | None,
    *,
    quiet: bool,
) -> Plan:
    """From the store's own text where no flag asks for other text, else from the source."""
    date = recorded.date if recorded else DATE
    if recorded is not None and recorded.empty:
        return _read_source(settings, source, infos, recorded, asked, quiet=quiet)
    held = recorded.text() if recorded else None
    if recorded is None or held is None:
        fresh = _read_source(settings, source, infos, recorded, asked, quiet=quiet)
        return replace(fresh, segments=recorded.segments) if recorded else fresh
    planned, tables = held
    if any(settings.given is None or name in settings.given for name in TEXT_FIELDS):
        # The budget counts the tokens of the models that the store was planned with.
        planned_with = {name: text for name, text in recorded.references().items() if name in tables}
        vouch_for((t for n, t in planned_with.items() if n not in infos), settings.store, settings.allowed, quiet=quiet)
        others = {name: spec.parse_model(text, settings.allowed) for name, text in planned_with.items()}
        counted = {n: infos.get(n) or models.inspect_model(s, settings.control_tokens) for n, s in others.items()}
        if asked is not None:
            asked.known = held_answers(recorded, planned, asked.generation)
        fresh = _read_source(settings, source, counted or infos, recorded, asked, quiet=quiet)
        if fresh.corpus.hash != planned.hash:
            return _grown(settings, recorded, planned, fresh, infos)
        planned, tables = fresh.corpus, dict(fresh.models)
    for name, info in infos.items():
        if name not in tables:
            tables[name] = plan_model(planned, info.tokenizer, name, info.context, date=date)
    return Plan(
        planned,
        {name: tables[name] for name in infos},
        settings.window_bytes,
        settings.batch_tokens,
        settings.shard_rows,
        _text_settings(settings, source),
        recorded.segments,
    )


_CHANGED_TEXT = "the text itself has changed, or an older featstore read it otherwise and cut its windows elsewhere"


def _grown(
    settings: Settings,
    recorded: Recorded,
    planned: PlannedCorpus,
    fresh: Plan,
    infos: dict[str, models.ModelInfo],
) -> Plan:
    """A plan that reads on where the store's ends."""
    if not fresh.corpus.begins_with(planned):
        used = recorded.settings()
        changed = [name for name in TEXT_FIELDS if used[name] != getattr(settings, name)]
        raise StoreStateError(
            f"{recorded.path} was made with other settings ({', '.join(changed) or _CHANGED_TEXT}); "
            "use the same command, a larger --max-tokens or --max-documents to add documents, or choose another --store"
        )
    absent = [name for name in recorded.models if name not in infos]
    added = [name for name in infos if name not in recorded.models]
    if absent or added:
        raise StoreStateError(
            f"{recorded.path}: more documents concern every model in it ({', '.join(recorded.models)}) and no other; "
            "leave --model out, and add models in a command of their own"
        )
    return replace(fresh, segments=(*recorded.segments, len(planned.window_document)))


def _text_settings(settings: Settings, source: Source) -> dict[str, Any]:
    return {
        "source": source.to_dict(),
        "normalise": settings.normalise,
        "control_tokens": settings.control_tokens,
        "max_tokens": settings.max_tokens,
        "max_documents": settings.max_documents,
        "max_document_bytes": settings.max_document_bytes,
        "seed": settings.seed,
        **({"generate": generation_of(settings).to_dict()} if settings.generate else {}),
    }


def _read_source(
    settings: Settings,
    source: Source,
    infos: dict[str, models.ModelInfo],
    recorded: Recorded | None,
    asked: Answering | None,
    *,
    quiet: bool,
) -> Plan:
    if recorded is not None and not settings.was_given("dataset"):
        vouch_for_text(source, str(recorded.path), settings.allowed, quiet=quiet)
    read = documents(
        normalised(shuffled(iter_texts(source), settings.seed), settings.normalise),
        max_documents=settings.max_documents,
        max_bytes=settings.max_document_bytes,
    )
    if asked is not None:
        read, quiet = asked.answered(read, infos), True  # answering has progress of its own
    with progress("tokenise", settings.max_tokens, "tok", quiet=quiet) as tick:
        return make_plan(
            read,
            {name: info.tokenizer for name, info in infos.items()},
            max_tokens=settings.max_tokens,
            window_bytes=settings.window_bytes,
            batch_tokens=settings.batch_tokens,
            shard_rows=settings.shard_rows,
            contexts={name: info.context for name, info in infos.items()},
            settings=_text_settings(settings, source),
            date=recorded.date if recorded else DATE,
            tick=tick,
        )
