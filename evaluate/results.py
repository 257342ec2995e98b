"""What `evaluate` writes: stitch.json, its sums by document, generations.json and communicate.json as frozen records.

Each file has one reader and one writer, here. `docs/results.md` is made from these classes by ``scripts/schema``; their
``Attributes:`` are its texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from align.judging.record import Findings
from align.results import Rate, unlike_lengths
from featstore.models.verdict import Verdict
from featstore.runtime.records import (
    EMPTY,
    Amount,
    Fault,
    Flag,
    Interval,
    Number,
    Part,
    Record,
    Table,
    Whole,
    flat,
    frame,
    read,
    write,
)
from featstore.runtime.schema import shown

if TYPE_CHECKING:
    import pandas as pd


class StartToken(Record):
    """The token that stands for the first one of a prompt that is hidden.

    Attributes:
        id: Its number.
        token: As the tokenizer writes it; null where it knows none of that number.
    """

    id: Whole | None = None
    token: str | None = None


# stitch.json -------------------------------------------------------------------------------------------------------


class Losses(Record):
    """How well the target predicts the scored tokens under one condition.

    Intervals are linearised ones with a t quantile, over documents (:func:`align.statistics.ratio`); null where the
    documents are too few, and ``reasons`` says so under ``ci95``.

    Attributes:
        nats_per_token: Cross-entropy of the next token, mean over scored tokens.
        ci95: Its 95 % interval.
        perplexity: exp of it; null where that is no finite number.
        perplexity_ci95: Its interval.
        bits_per_byte: Loss in bits over the bytes that the scored tokens span; comparable across tokenizers.
        bits_per_byte_ci95: Its interval.
        kl: Divergence of this condition's predictions from the clean ones, nats per token.
        kl_ci95: Its interval.
        top1: Share of tokens with the clean first choice.
        top1_ci95: Its interval.
        below_mean: Nats per token less than under the ``mean`` control, over the same documents.
        below_mean_ci95: Its interval.
    """

    nats_per_token: Number | None = None
    ci95: Interval | None = None
    perplexity: Amount | None = None
    perplexity_ci95: Interval | None = None
    bits_per_byte: Number | None = None
    bits_per_byte_ci95: Interval | None = None
    kl: Number | None = None
    kl_ci95: Interval | None = None
    top1: Part | None = None
    top1_ci95: Interval | None = None
    below_mean: Number | None = None
    below_mean_ci95: Interval | None = None


class AloneLosses(Losses):
    """A model by itself on its own tokens of the same text.

    Attributes:
        n_documents: Documents.
        effective_documents: Equally long documents that would say as much.
        n_tokens: Scored tokens.
        n_bytes: Bytes that they span.
    """

    n_documents: Whole | None = None
    effective_documents: Amount | None = None
    n_tokens: Whole | None = None
    n_bytes: Whole | None = None


class Alone(Record):
    """Both models by themselves.

    Attributes:
        source: With ``--source-alone``; null without.
        target: As under ``clean``.
    """

    source: AloneLosses | None = None
    target: AloneLosses | None = None


class Share(Record):
    """A difference or a share, and its 95 % interval.

    Attributes:
        value: Null where it is undefined.
        ci95: Over documents, or examples; null where they are too few, or a share has no interval.
    """

    value: Number | None = None
    ci95: Interval | None = None


class Beyond(Record):
    """How much lower the loss is with mapped states than under one control, over the same documents.

    Attributes:
        nats: Control - mapped, nats per token.
        ci95: Its 95 % interval; null where the documents are too few.
        p: Two-sided p value of no difference.
        beaten: Whether the whole interval is above 0; null without one.
    """

    nats: Number | None = None
    ci95: Interval | None = None
    p: Number | None = None
    beaten: Flag | None = None


class StitchedPair(Record):
    """The target's loss with states of one layer pair put in.

    Attributes:
        n_documents: Documents scored.
        effective_documents: Equally long documents that would say as much, 1 / sum of the squared shares of the tokens.
        n_tokens: Target tokens scored.
        replaced_share: Share of the target's positions that take a state.
        self_bit_identical: Whether putting the target's own states back gave its own logits, bit by bit.
        conditions: By name: ``clean`` (nothing put in), ``self`` (the target's own states), ``mapped``, and the
            controls ``token`` (the best prediction of the target's state from the source token alone), ``mean``,
            ``zero``, ``random_norm``, ``random_rotation``, ``shuffled``, ``raw``; null where one was not run.
        reasons: Why a condition was not run or a figure is null, by its name; of every interval over documents
            ``ci95``, of a single one ``<figure>.ci95``.
        beyond_token: What the map adds to the token alone: ``token`` among ``controls``.
        recovered_token: (token - mapped) / (token - clean), of the losses, with Fieller's interval; null where the
            token's prediction does no harm. No interval where it does not clearly do any.
        recovered: The same from ``mean``.
        controls: By control how much lower the loss is with mapped states. Whether a control is beaten is decided
            here, in nats, and not by shares, which have no sign where a control does no harm.
        beats_every_control: Whether every control is beaten: an intersection-union test (Berger 1982), at the level of
            one of its tests. Null where no control stands, and one was not run or has no interval.
        closest_control: The control whose loss is nearest to the mapped one, or furthest below it; a description, no
            figure is chosen by it.
        alone: Both models by themselves.
        rate: What a compressed run sends.
        leak: What the swap test found at the target's layer: how much later blocks learn of the text past the stream,
            as a share of what another text does to the logits; 0 where nothing leaks, null where it is no finite
            number.
        warnings: What stands against reading the figures as those of the injected states.
    """

    n_documents: Whole | None = None
    effective_documents: Amount | None = None
    n_tokens: Whole | None = None
    replaced_share: Part | None = None
    self_bit_identical: Flag | None = None
    conditions: Table[Losses | None] = EMPTY
    reasons: Table[str] = EMPTY
    beyond_token: Beyond = Beyond()
    recovered_token: Share = Share()
    recovered: Share = Share()
    controls: Table[Beyond] = EMPTY
    beats_every_control: Flag | None = None
    closest_control: str | None = None
    alone: Alone = Alone()
    rate: Rate | None = None
    leak: Number | None = None
    warnings: Findings = ()


class Stitched(Record):
    """Contents of ``stitch.json``: the target's loss with states of the source put in.

    Attributes:
        adapter_type: The run's type of map.
        split: ``train``, ``val`` or ``test``.
        keep: What later blocks read of positions that take no state: ``own`` or ``hide``.
        roles: The roles whose tokens are scored (``--roles``); null for all. States are put in at all positions.
        seed: Of the random controls.
        pairs: By layer pair.
        verified: What was tested on the models, by name.
        start: With ``hide`` the start token, by target.
        judged: Version of the table of findings that the file was judged by; absent in files of earlier versions.
    """

    file: ClassVar[str] = "stitch.json"
    made_by: ClassVar[str] = "evaluate stitch"
    always: ClassVar[tuple[str, ...]] = ("pairs",)

    adapter_type: str | None = None
    split: str | None = None
    keep: str | None = None
    roles: tuple[str, ...] | None = None
    seed: Whole | None = None
    pairs: Table[StitchedPair] = EMPTY
    verified: Table[Verdict] = EMPTY
    start: Table[StartToken] = EMPTY
    judged: Whole | None = None

    def to_pandas(self) -> pd.DataFrame:
        """One row for every layer pair and condition that was run: ``pair``, ``condition``, its figures, ``leak``."""
        return frame(
            {"pair": key, "condition": name, **flat(losses), "leak": None if name == "clean" else pair.leak}
            for key, pair in self.pairs.items()
            for name, losses in pair.conditions.items()
            if losses is not None
        )


class StitchedSums(Record):
    """Sums of one layer pair by document, under every condition that was run.

    Attributes:
        documents: Numbers in the store of the documents with a scored token, ascending.
        tokens: Scored target tokens of each; the same under every condition.
        bytes: Bytes that they span.
        nats: By condition, summed loss of each document.
        kl: By condition, summed divergence from the clean predictions, nats.
        same: By condition, tokens with the clean first choice.
    """

    documents: tuple[Whole, ...] = ()
    tokens: tuple[Whole, ...] = ()
    bytes: tuple[Whole, ...] = ()
    nats: Table[tuple[Number | None, ...]] = EMPTY
    kl: Table[tuple[Number | None, ...]] = EMPTY
    same: Table[tuple[Whole, ...]] = EMPTY

    def faults(self) -> Iterator[Fault]:
        """Lists of another length than that of the documents, and conditions that lack a sum."""
        lists: dict[tuple[str | int, ...], Sequence[Any]] = {}
        lists |= {(kind,): getattr(self, kind) for kind in ("tokens", "bytes") if self.has(kind)}
        for kind in ("nats", "kl", "same"):
            lists |= {(kind, name): values for name, values in getattr(self, kind).items()}
            missing = [name for name in self.nats if self.has(kind) and name not in getattr(self, kind)]
            if missing:
                yield (kind,), f"has no {shown(missing[0])}, expected every condition of nats"
        yield from unlike_lengths(lists, len(self.documents), "documents")


class StitchedDocuments(Record):
    """Contents of ``stitch_documents.json``: the sums behind ``stitch.json``, for any interval of one's own.

    Attributes:
        split: ``train``, ``val`` or ``test``.
        pairs: By layer pair.
    """

    file: ClassVar[str] = "stitch_documents.json"
    made_by: ClassVar[str] = "evaluate stitch"
    always: ClassVar[tuple[str, ...]] = ("pairs",)

    split: str | None = None
    pairs: Table[StitchedSums] = EMPTY

    def to_pandas(self) -> pd.DataFrame:
        """One row for every layer pair, condition and document, with its sums."""
        return frame(
            {
                "pair": key,
                "condition": name,
                "document": number,
                "tokens": sums.tokens[place] if sums.tokens else None,
                "bytes": sums.bytes[place] if sums.bytes else None,
                "nats": nats[place],
                "kl": sums.kl[name][place] if sums.kl else None,
                "same": sums.same[name][place] if sums.same else None,
            }
            for key, sums in self.pairs.items()
            for name, nats in sums.nats.items()
            for place, number in enumerate(sums.documents)
        )


# generations.json --------------------------------------------------------------------------------------------------


class Likelihoods(Record):
    """Nats per token of the receiving model's own continuation, under each condition of the texts.

    Attributes:
        source_alone: Of the source's own text, by the source.
        target_alone: Of the target's own text, by the target.
        source_to_target: By layer pair and condition, of ``target_alone``.
        target_to_source: By layer pair and condition, of ``source_alone``.
    """

    source_alone: Number | None = None
    target_alone: Number | None = None
    source_to_target: Table[Table[Number | None]] = EMPTY
    target_to_source: Table[Table[Number | None]] = EMPTY


class PromptTexts(Record):
    """One prompt and how it goes on.

    Attributes:
        prompt: Text.
        source: Model name.
        target: Model name.
        source_alone: The source's own continuation; null where the run does not need that model.
        target_alone: The target's own.
        source_to_target: By layer pair and condition (``mapped``, ``self``, ``mean``, ``random_norm``, ``shuffled``)
            what the target says with these states in the prompt; null where there are none.
        target_to_source: The same the other way, of a run with ``--both``.
        likelihood: Of the same shape.
    """

    prompt: str = ""
    source: str = ""
    target: str = ""
    source_alone: str | None = None
    target_alone: str | None = None
    source_to_target: Table[Table[str | None]] = EMPTY
    target_to_source: Table[Table[str | None]] = EMPTY
    likelihood: Likelihoods = Likelihoods()


class Generations(Record):
    """Contents of ``generations.json``: prompts continued in every condition.

    Attributes:
        max_new_tokens: Length of a continuation at most.
        decoding: ``greedy``, or how tokens were drawn.
        seed: Of the random controls.
        likelihood: What the figures of that name are, in words.
        entries: One a prompt.
        leaks: By layer pair what the swap test found at the target's layer; 0 where nothing leaks, null where it is no
            finite number.
        warnings: What stands against reading the texts as those of the injected states.
        judged: Version of the table of findings that the file was judged by; absent in files of earlier versions.
        verified: What was tested on the models, by name.
    """

    file: ClassVar[str] = "generations.json"
    made_by: ClassVar[str] = "evaluate generate"
    always: ClassVar[tuple[str, ...]] = ("entries",)

    max_new_tokens: Whole | None = None
    decoding: str | None = None
    seed: Whole | None = None
    likelihood: str | None = None
    entries: tuple[PromptTexts, ...] = ()
    leaks: Table[Number | None] = EMPTY
    warnings: Findings = ()
    judged: Whole | None = None
    verified: Table[Verdict] = EMPTY

    def to_pandas(self) -> pd.DataFrame:
        """One row for every text: ``prompt``, ``model``, ``pair``, ``condition``, ``text``, ``nats_per_token``.

        ``leak`` is that of the pair. ``condition`` of a model's own continuation is ``alone``, and it has no pair.
        """
        rows = []
        for entry in self.entries:
            nats = entry.likelihood
            sides = (
                (entry.source, entry.source_alone, nats.source_alone, entry.target_to_source, nats.target_to_source),
                (entry.target, entry.target_alone, nats.target_alone, entry.source_to_target, nats.source_to_target),
            )
            for model, own, own_nats, texts, figures in sides:
                said: list[tuple[str | None, str, str, float | None]] = []
                if own is not None:
                    said.append((None, "alone", own, own_nats))
                said += [
                    (key, name, text, figures.get(key, {}).get(name))
                    for key, conditions in texts.items()
                    for name, text in conditions.items()
                    if text is not None
                ]
                rows += [
                    {
                        "prompt": entry.prompt,
                        "model": model,
                        "pair": key,
                        "condition": name,
                        "text": text,
                        "nats_per_token": value,
                        "leak": None if key is None else self.leaks.get(key),
                    }
                    for key, name, text, value in said
                ]
        return frame(rows)


# communicate.json --------------------------------------------------------------------------------------------------


class Answers(Record):
    """Answers under one condition.

    Attributes:
        condition: Its name without the pair.
        pair: Layer pair; null for ``silent``, ``text`` and ``summary``.
        accuracy: Share of right answers.
        ci95: Wilson's 95 % interval, with the design effect of questions that share a cluster.
        right: Right answers.
        n: Answers.
        bytes: What travels for an example, in the mean: UTF-8 bytes of a text, bytes of states, or of latents.
    """

    condition: str | None = None
    pair: str | None = None
    accuracy: Part | None = None
    ci95: Interval | None = None
    right: Whole | None = None
    n: Whole | None = None
    bytes: Number | None = None


class Gain(Share):
    """How much more often one condition is right than another on the same questions.

    ``ci95`` is Tango's score interval; clusters of questions are units (:func:`align.statistics.paired_proportions`).

    Attributes:
        p: Exact two-sided p value of no difference.
        first_alone: Questions that only the first gets right.
        second_alone: Questions that only the second gets right.
        clusters: Clusters of questions, each of them one piece of evidence.
        above: Whether the first is right more often: the interval is above 0 and the exact test agrees at 5 %.
    """

    p: Number | None = None
    first_alone: Whole | None = None
    second_alone: Whole | None = None
    clusters: Whole | None = None
    above: Flag | None = None


class Beats(Record):
    """Whether a way of sending states is right more often than the question alone and both its controls.

    Attributes:
        p: Largest p value of its gains: to beat all of them each has to be beaten (an intersection-union test); 1
            where one is not positive, null where a control was not run.
        p_adjusted: The same, adjusted for the number of ways that the task tries (Holm).
        beats: Whether all gains are ``above``, and ``p_adjusted`` is at most 5 %.
    """

    p: Number | None = None
    p_adjusted: Number | None = None
    beats: Flag | None = None


class MapSize(Record):
    """What the receiver holds of a map, and what else reaches it.

    Attributes:
        map_numbers: Numbers in the map; 0 for the identity.
        rate: What a compressed run sends for all contexts together.
        leak: What the swap test found at the target's layer; 0 where nothing leaks, null where it is no finite number.
    """

    map_numbers: Whole | None = None
    rate: Rate | None = None
    leak: Number | None = None


class Question(Record):
    """One example of a task.

    Attributes:
        context: What the source reads.
        question: What the target is asked.
        answer: The first right answer.
        summary: The source's summary of the context.
        given: The answer under every condition.
    """

    context: str = ""
    question: str = ""
    answer: str = ""
    summary: str = ""
    given: Table[str] = EMPTY


class TaskAnswers(Record):
    """One task in one direction.

    Attributes:
        task: Its name.
        source: The model that reads the context.
        target: The model that answers.
        n: Examples.
        clusters: Clusters of examples: those of one landmark, thing, company or context are no independent evidence.
        chance: Accuracy on these examples of the best answer that does not read: one that is always the same, one from
            a fixed place among the choices or in the context, or the question itself.
        chance_is: What that is, in words.
        scoring: How an answer is found right.
        conditions: By ``silent``, ``text``, ``summary`` and ``<condition> <pair>``: ``replace``, ``sum``, ``mean``
            (the source's last state into the question's last position), ``aligned`` (every position of the context),
            and each with ``_random`` and ``_shuffled``; those of ``replace`` are ``random`` and ``shuffled``.
        text_over_silent: How much more often the text is right than the question alone.
        gains: By ``<condition> <pair>`` how much more often it is right than ``silent``, ``random`` and ``shuffled``.
        beats: By ``<condition> <pair>`` whether it is right more often than all of them.
        pairs: By layer pair.
        reasons: Why a condition was not run.
        warnings: What stands against reading the accuracies as communication.
        undelivered: Characters of the source's summaries that the target's tokenizer cannot spell; the summaries were
            delivered without them.
        examples: The questions with all answers.
    """

    task: str | None = None
    source: str = ""
    target: str = ""
    n: Whole | None = None
    clusters: Whole | None = None
    chance: Part | None = None
    chance_is: str | None = None
    scoring: str | None = None
    conditions: Table[Answers] = EMPTY
    text_over_silent: Gain = Gain()
    gains: Table[Table[Gain]] = EMPTY
    beats: Table[Beats] = EMPTY
    pairs: Table[MapSize] = EMPTY
    reasons: Table[str] = EMPTY
    warnings: Findings = ()
    undelivered: Whole | None = None
    examples: tuple[Question, ...] = ()


class Communication(Record):
    """Contents of ``communicate.json``: whether the target can answer what only the source has read.

    Attributes:
        adapter_type: The run's type of map.
        format: What states travel in.
        seed: Of the examples and controls.
        summary_tokens: Length of a summary.
        max_new_tokens: Length of a free answer.
        decoding: How answers are chosen.
        interval: Which intervals these are, in words.
        tasks: By name; with both directions a name ends in ``(<source>-><target>)``.
        verified: What was tested on the models, by name.
        start: The start token of ``aligned`` answers, by target; of those that gave some.
        judged: Version of the table of findings that the file was judged by; absent in files of earlier versions.
    """

    file: ClassVar[str] = "communicate.json"
    made_by: ClassVar[str] = "evaluate communicate"
    always: ClassVar[tuple[str, ...]] = ("tasks",)

    adapter_type: str | None = None
    format: str | None = None
    seed: Whole | None = None
    summary_tokens: Whole | None = None
    max_new_tokens: Whole | None = None
    decoding: str | None = None
    interval: str | None = None
    tasks: Table[TaskAnswers] = EMPTY
    verified: Table[Verdict] = EMPTY
    start: Table[StartToken] = EMPTY
    judged: Whole | None = None

    def to_pandas(self) -> pd.DataFrame:
        """One row for every task and condition: ``task``, ``chance``, ``condition``, ``pair``, figures, ``leak``."""
        return frame(
            {
                "task": name,
                "chance": task.chance,
                **flat(answers),
                "leak": task.pairs.get(answers.pair or "", _UNKNOWN).leak,
            }
            for name, task in self.tasks.items()
            for answers in task.conditions.values()
        )


#: Of conditions without states.
_UNKNOWN = MapSize()


# Readers and writers -----------------------------------------------------------------------------------------------


def read_stitch(where: Path | str) -> Stitched:
    """Read ``stitch.json``.

    Args:
        where: Its directory, or the file.

    Raises:
        AdapterError: There is none.
        CorruptDataError: It is damaged.
    """
    return read(Stitched, where)


def read_stitch_documents(where: Path | str) -> StitchedDocuments:
    """Read ``stitch_documents.json``.

    Args:
        where: Its directory, or the file.

    Raises:
        AdapterError: There is none.
        CorruptDataError: It is damaged.
    """
    return read(StitchedDocuments, where)


def read_generations(where: Path | str) -> Generations:
    """Read ``generations.json``.

    Args:
        where: Its directory, or the file.

    Raises:
        AdapterError: There is none.
        CorruptDataError: It is damaged.
    """
    return read(Generations, where)


def read_communication(where: Path | str) -> Communication:
    """Read ``communicate.json``.

    Args:
        where: Its directory, or the file.

    Raises:
        AdapterError: There is none.
        CorruptDataError: It is damaged.
    """
    return read(Communication, where)


def write_stitch(directory: Path, stitched: Stitched) -> Path:
    """Write ``stitch.json`` into a directory and return its path."""
    return write(stitched, directory)


def write_stitch_documents(directory: Path, documents: StitchedDocuments) -> Path:
    """Write ``stitch_documents.json`` into a directory and return its path."""
    return write(documents, directory)


def write_generations(directory: Path, generations: Generations) -> Path:
    """Write ``generations.json`` into a directory and return its path."""
    return write(generations, directory)


def write_communication(directory: Path, communication: Communication) -> Path:
    """Write ``communicate.json`` into a directory and return its path."""
    return write(communication, directory)


def kind_of(name: str) -> type[Record] | None:
    """The record that a file of this name holds; None for a file that is no result of `evaluate`.

    Args:
        name: File name.
    """
    return {kind.file: kind for kind in (Stitched, StitchedDocuments, Generations, Communication)}.get(name)
