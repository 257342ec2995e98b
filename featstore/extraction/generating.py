"""Models answer documents before these are read: which ones, which answers are known, how far a budget goes.

A document of the store is then a prompt with one model's answer, and has the prompt's id: all answers to one prompt are
in one split. Answers come from the store where it has them, else from the cache, else from the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from featstore.errors import CorpusError, ModelLoadError
from featstore.extraction import proof
from featstore.extraction.answer_cache import VERSION, AnswerCache, prompt_key
from featstore.extraction.compute import Compute
from featstore.models import answering
from featstore.models import loading as models
from featstore.models.probe.prove import Needs, further
from featstore.models.probe.refusals import refuse_continuing
from featstore.models.residual import ResidualStream
from featstore.models.sampling import Sampling
from featstore.runtime.console import err, human, progress
from featstore.runtime.processes import Ranks
from featstore.runtime.provenance import digest
from featstore.text import answers, tokens
from featstore.text.chat import DATE
from featstore.text.chat_tokens import tokenize_conversations
from featstore.text.conversation import to_json
from featstore.text.documents import Document
from featstore.text.plan import PlannedCorpus
from featstore.text.roles import ASSISTANT, GENERATED
from featstore.text.windows import windows

#: Prompts that are answered together at least, even where a budget needs fewer: loading models takes longer.
_LEAST = 16


@dataclass(frozen=True)
class Generation:
    """How documents are answered.

    Attributes:
        tokens: New tokens at most.
        names: The models that answer, each of them every document.
        temperature: Divides the logits; 0 takes the likeliest token each time.
        top_p: Draw from the fewest likeliest tokens that together have this probability.
        seed: Of the draws.
    """

    tokens: int
    names: tuple[str, ...]
    temperature: float
    top_p: float
    seed: int

    @property
    def sample(self) -> Sampling | None:
        """How tokens are drawn; None for greedy."""
        return Sampling(self.temperature, self.top_p, self.seed) if self.temperature else None

    def to_dict(self) -> dict[str, Any]:
        """As it is recorded in the store."""
        found = {"tokens": self.tokens, "with": list(self.names), "temperature": self.temperature, "top_p": self.top_p}
        return {**found, "seed": self.seed}


#: Answers that a store holds, by model, prompt id and :func:`_asked`.
Known = Mapping[tuple[str, bytes, str], str]


def known_answers(corpus: PlannedCorpus, generation: Generation, *, whole: bool) -> Known:
    """The answers in the text of a store.

    Args:
        corpus: The store's text.
        generation: How it was generated.
        whole: Whether no budget cut the last document.
    """
    found = {}
    after = np.searchsorted(corpus.message_document, np.arange(len(corpus.document_id)), side="right")
    for number in range(len(corpus.document_id) - (not whole)):
        start, end = (int(corpus.document_start[number + i]) for i in (0, 1))
        last, answer = int(after[number]) - 1, end
        if last >= 0 and corpus.message_document[last] == number:
            wrote = int(corpus.message_role[last]) in (GENERATED, ASSISTANT)
            answer = start + int(corpus.message_start[last]) if wrote else end
        prompt, said = (corpus.text[a:b].tobytes().decode() for a, b in ((start, answer), (answer, end)))
        name = generation.names[number % len(generation.names)]
        found[name, corpus.document_id[number].tobytes(), prompt_key(prompt)] = said
    return found


@dataclass
class Answering:
    """Models that answer documents, one after the other.

    Attributes:
        generation: How.
        compute: How models are run.
        form: Unicode form of the text.
        window_bytes: Window length.
        max_tokens: Budget of each model over all windows; None for all.
        batch_tokens: Padded tokens of a batch at most.
        date: The day that chat templates are told.
        known: Answers that the store holds.
        switches: Lengths at which models change their position encoding, by name.
        load: Whether models are loaded for answers that nobody knows; without it their documents are prompts alone.
        quiet: No progress.
        ranks: This process among several; the first one answers.
        unanswered: How many answers nobody knew, without ``load``.
        empty: How many answers were empty.
        infos: The models that read.
        left_out: Answers to messages that some model's chat template does not write as they are, each in a line.
    """

    generation: Generation
    compute: Compute
    form: str
    window_bytes: int
    max_tokens: int | None
    batch_tokens: int
    date: str = DATE
    known: Known = field(default_factory=dict)
    switches: Mapping[str, int] = field(default_factory=dict)
    load: bool = True
    quiet: bool = False
    ranks: Ranks = field(default_factory=Ranks)
    unanswered: int = 0
    empty: int = 0
    left_out: list[str] = field(default_factory=list)
    infos: Mapping[str, models.ModelInfo] = field(default_factory=dict)
    _voice: tuple[str, ResidualStream] | None = None

    def answered(self, prompts: Iterable[Document], infos: Mapping[str, models.ModelInfo]) -> Iterator[Document]:
        """Every document with the answer of every model, as far as a budget reads.

        Args:
            prompts: In corpus order.
            infos: All models that will read the answers, by name, the ones that answer among them.

        Yields:
            For each prompt as many documents as models answer, in their order.

        Raises:
            CorpusError: A conversation has nothing to answer, or does not fit.
            ModelLoadError: A model is not at hand.
            ProbeError: A model cannot go on from a prompt.
            SpecError: No word fits before an answer.
        """
        self.infos = infos
        asked = (self._prompt(document) for document in prompts)
        spent = dict.fromkeys(self.infos, 0)
        try:
            while chunk := list(self._chunk(asked, max(spent.values()))):
                said = {name: self._answers(name, chunk) for name in self.generation.names}
                for place, prompt in enumerate(chunk):
                    for name in self.generation.names:
                        answer = said[name][place]
                        self.empty += answer == ""
                        document, counts = self._readable(prompt, answer or "")
                        for reader, count in counts.items():
                            spent[reader] += count
                        yield document
                    if self.max_tokens is not None and max(spent.values()) > self.max_tokens:
                        return
        finally:
            self._voice = None  # a model that answers no more gives its memory back

    def _readable(self, prompt: Document, answer: str) -> tuple[Document, dict[str, int]]:
        """A prompt with an answer, as every model can read it, and what it costs of the budget."""
        document = answers.answered(prompt, answer, self.form)
        try:
            return document, self._tokens(document)
        except CorpusError as error:
            if document is prompt:
                raise
            # What a model says may be what a template takes for its own, such as thoughts between marks.
            self.left_out.append(str(error))
            return prompt, self._tokens(prompt)

    def _prompt(self, document: Document) -> Document:
        if document.conversation is not None:
            answers.awaiting_answer(document.conversation)
        names, new = self.generation.names, self.generation.tokens
        tokenizers = {name: self.infos[name].tokenizer for name in names}
        prompt = answers.fitting(
            document, tokenizers, {name: self.infos[name].context for name in names}, new, self.date
        )
        for name, switch in self.switches.items():
            # A model that changes its positions at some length cannot go on from what it read before that.
            count = len(answers.prompt_ids(tokenizers[name], name, prompt, self.date)) if name in names else 0
            if 0 < count <= switch < count + new:
                prompt = answers.fitting(prompt, {name: tokenizers[name]}, {name: switch}, new, self.date)
        return prompt

    def _chunk(self, prompts: Iterator[Document], spent: int) -> Iterator[Document]:
        """Prompts whose answers, if none ends early, fit what is left of the budget; all of them without a budget."""
        if self.max_tokens is None:
            yield from prompts
            return
        if spent > self.max_tokens:
            return
        for number, prompt in enumerate(prompts):
            yield prompt
            spent += len(self.generation.names) * (max(self._tokens(prompt).values()) + self.generation.tokens)
            if spent > self.max_tokens and number + 1 >= _LEAST:
                return

    def _tokens(self, document: Document) -> dict[str, int]:
        """How many tokens of a document each model reads."""
        if document.conversation is not None:
            return {
                name: len(tokenize_conversations(info.tokenizer, name, [document.conversation], date=self.date)[0].ids)
                for name, info in self.infos.items()
            }
        if self.max_tokens is None:
            return {}
        raw = document.text.encode()
        texts = [raw[start:end].decode() for start, end in windows(raw, self.window_bytes)]
        return {
            name: sum(len(window.ids) for window in tokens.tokenize(info.tokenizer, texts))
            for name, info in self.infos.items()
        }

    def _answers(self, name: str, prompts: list[Document]) -> list[str | None]:
        """One model's answers to some prompts; None for those that nobody knows, without ``load``."""
        asked = [_asked(prompt) for prompt in prompts]
        found = [self.known.get((name, p.id, prompt_key(p.text))) for p in prompts]
        cache = self._cache(name)
        if not self.ranks.first:
            self.ranks.wait()  # until the first process has answered
            if cache is not None:
                cache.read()
        if cache is not None:
            found = [cache.get(key) if text is None else text for key, text in zip(asked, found, strict=True)]
        missing = {key: place for place, (key, text) in enumerate(zip(asked, found, strict=True)) if text is None}
        fresh: dict[str, str] = {}
        if missing and self.load and self.ranks.first:
            fresh = self._generate(name, {key: prompts[place] for key, place in missing.items()})
        if self.ranks.first:
            self.ranks.wait()
        if missing and self.load and not self.ranks.first:
            raise ModelLoadError(
                f"model {name!r}: the answers of the first process did not arrive; with several processes --generate "
                "needs a cache directory that all of them share (FEATSTORE_CACHE)"
            )
        if not self.load:
            self.unanswered += sum(text is None for text in found)
        return [fresh.get(key) if text is None else text for key, text in zip(asked, found, strict=True)]

    def _cache(self, name: str) -> AnswerCache | None:
        """Where a model's answers are kept; None while its weights are not on this disk."""
        info = self.infos[name]
        model = proof.key(info, self.compute, name)
        how = {key: value for key, value in self.generation.to_dict().items() if key != "with"}
        asked = [info.tokenizer_hash, info.tokenizer.split_special_tokens, info.tokenizer.chat_template, self.date]
        return None if model is None else AnswerCache(digest([VERSION, model, asked, how]))

    def _generate(self, name: str, missing: Mapping[str, Document]) -> dict[str, str]:
        """Answers by :func:`_asked`, kept as they come."""
        generation, info = self.generation, self.infos[name]
        stream = self._stream(name)
        cache = self._cache(name)
        who = digest([info.config_hash, info.tokenizer_hash])
        keys, ids = (
            list(missing),
            [answers.prompt_ids(info.tokenizer, name, prompt, self.date) for prompt in missing.values()],
        )
        models.refuse_unknown_ids(info, np.concatenate([np.array(row, dtype=np.int64) for row in ids]))
        stops = answering.stops_of(stream.model, info.tokenizer)
        sizes = [len(row) for row in ids]
        found: dict[str, str] = {}
        with progress(f"{name} answers", len(keys), "documents", quiet=self.quiet) as tick:
            for batch in answering.batches(stream, sizes, generation.tokens, self.batch_tokens):
                said: list[list[int]] = answering.answers(
                    stream,
                    [ids[place] for place in batch],
                    length=generation.tokens,
                    stops=stops,
                    sample=generation.sample,
                    numbers=[_number(who, keys[place]) for place in batch],
                )
                new = {keys[place]: answers.spoken(info.tokenizer, row) for place, row in zip(batch, said, strict=True)}
                found |= new
                if cache is not None:
                    cache.put(new)
                tick(len(batch))
        return found

    def _stream(self, name: str) -> ResidualStream:
        """A model that is ready to answer; the one before it is let go."""
        if self._voice is None or self._voice[0] != name:
            self._voice = None
            info = self.infos[name]
            if not self.quiet:
                err.print(f"loading {name} ({info.spec.ref}) to answer{info.peculiarities}")
            proven = proof.tested(info, self.compute, name, device=self.ranks.device(self.compute.device))
            proven = further(proven, Needs(continuing=True))
            refuse_continuing(name, proven.verdict)
            self._voice = (name, proven.stream)
        return self._voice[1]

    def say(self) -> None:
        """Say what is unexpected about the answers."""
        if self.empty and not self.quiet:
            err.print(
                f"note: {human(self.empty)} of the answers are empty, as the model ended its text at once; their "
                "documents are the prompts alone"
            )
        if self.left_out and not self.quiet:
            err.print(
                f"note: {human(len(self.left_out))} of the answers are left out, as a chat template does not write "
                f"them as they are; the first: {self.left_out[0]}"
            )


def _asked(prompt: Document) -> str:
    """What a model is asked, as a name."""
    if prompt.conversation is None:
        return prompt_key(prompt.text)
    rows = [message.row() for message in prompt.conversation.messages]
    return hashlib.sha256(b"messages" + to_json([rows, prompt.conversation.tools])).hexdigest()


def _number(who: str, asked: str) -> int:
    """The number that fixes the draws of one model's answer to one prompt."""
    return int.from_bytes(hashlib.sha256(f"{who} {asked}".encode()).digest()[:8], "big")
