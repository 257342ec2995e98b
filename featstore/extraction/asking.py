"""Which models answer the documents of an extraction, and what is known already of what they would say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from featstore.errors import SpecError
from featstore.extraction.compute import Compute
from featstore.extraction.flags import flag
from featstore.extraction.generating import Answering, Generation, Known, known_answers
from featstore.extraction.recorded import Recorded
from featstore.extraction.settings import Settings
from featstore.models.loading import ModelInfo
from featstore.models.verdict import Verdict
from featstore.runtime.processes import Ranks
from featstore.text.chat import DATE
from featstore.text.message_arrays import holds_conversations
from featstore.text.plan import PlannedCorpus

#: Tokens that no tokenizer adds to a window.
_ADDED = 16


def writers(settings: Settings, infos: Mapping[str, ModelInfo], recorded: Recorded | None) -> tuple[str, ...]:
    """The models that answer the documents, in store order; none where nothing is generated.

    Args:
        settings: As given, completed from the store.
        infos: Models to run, by name.
        recorded: What the store says about itself.

    Raises:
        SpecError: No such model, or flags that mean nothing without others.
    """
    if not settings.generate:
        typed = [n for n in ("generate_with", "temperature", "top_p") if settings.given and n in settings.given]
        if typed:
            raise SpecError(f"{flag(typed[0])} needs --generate: how many tokens are written after each document")
        return ()
    if settings.top_p != 1 and not settings.temperature:
        raise SpecError(f"--top-p {settings.top_p:g} needs --temperature: without it the likeliest token is taken")
    begun = recorded is not None and not recorded.empty
    there = tuple(dict.fromkeys((*(recorded.models if recorded and begun else ()), *infos)))
    wanted = settings.generate_with if begun or settings.was_given("generate_with") else ()
    unknown = [name for name in wanted if name not in there]
    if unknown:
        raise SpecError(f"--generate-with {unknown[0]}: there is no such model; name one of {', '.join(there)}")
    return tuple(name for name in there if name in wanted or not wanted)


def generation_of(settings: Settings) -> Generation:
    """How documents are answered.

    Args:
        settings: With the models that :func:`writers` gives.
    """
    names, seed = settings.generate_with, settings.seed
    return Generation(settings.generate, names, settings.temperature, settings.top_p, seed)


def asking(
    settings: Settings,
    compute: Compute,
    recorded: Recorded | None,
    verdicts: Mapping[str, Verdict],
    *,
    load: bool,
    quiet: bool,
) -> Answering | None:
    """Models about to answer; None where nothing is generated.

    Args:
        settings: With the models that :func:`writers` gives.
        compute: How models are run.
        recorded: What the store says about itself.
        verdicts: What is known of the models.
        load: Whether models are loaded for answers that nobody knows.
        quiet: No progress.
    """
    if not settings.generate:
        return None
    read = {name: verdict.reading for name, verdict in verdicts.items()}
    held = recorded.attention() if recorded else {}
    return Answering(
        generation=generation_of(settings),
        compute=replace(compute, attention={**held, **compute.attention}),
        form=settings.normalise,
        window_bytes=settings.window_bytes,
        max_tokens=settings.max_tokens,
        batch_tokens=settings.batch_tokens,
        date=recorded.date if recorded else DATE,
        switches={name: one.switch for name, one in read.items() if one is not None and one.switch is not None},
        load=load,
        quiet=quiet,
        ranks=Ranks.from_environment(),
    )


def held_answers(recorded: Recorded, held: PlannedCorpus, generation: Generation) -> Known:
    """The answers that a store holds whole.

    Args:
        recorded: What the store says about itself.
        held: Its text.
        generation: How it was generated.
    """
    # The last document may be cut where another window, whatever it held, may not have fitted the budget.
    budget = recorded.settings()["max_tokens"]
    rows = max((int(attributes["rows"]) for attributes in recorded.models.values()), default=0)
    window = int(recorded.root["window_bytes"]) + _ADDED  # a token has a byte at least, but for those that are added
    whole = budget is None or holds_conversations(held) or rows + window <= budget
    return known_answers(held, generation, whole=whole)
