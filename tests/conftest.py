"""What several test files share: the demo pair, trained tokenizers, tiny random models, a small store, the commands."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import settings as hypothesis_settings

from tests.support import ROOT
from tests.support.commands import command_environment, command_line
from tests.support.tiny_models import save_with_tokenizer

# The machine may be shared: a slow example is not a failure.
hypothesis_settings.register_profile("featstore", deadline=None)
hypothesis_settings.register_profile("quick", deadline=None, max_examples=25)
hypothesis_settings.load_profile("featstore")

# A shell that runs the tests in the background tells them, and all they start, to ignore Ctrl-C; some tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before any hub library is imported: no test may reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


#: Tests are marked by what they ask for, so that none is forgotten: a download, or a browser.
MARKS = {"demo_models": "demo_pair", "browser": "thorough", "zarrita_npm": "thorough"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for fixture, mark in MARKS.items():
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(mark)


#: Context of the tiny models; their windows are shorter.
TINY_CONTEXT = 1024
#: Shorter than the tiny store's windows, so that the sliding window matters.
TINY_SLIDING_WINDOW = 24


@pytest.fixture(scope="session", autouse=True)
def cache_away_from_home(tmp_path_factory) -> None:
    """What commands remember between runs goes to a directory of this process, for all they start as well."""
    os.environ["FEATSTORE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def demo_models() -> SimpleNamespace:
    """The demo models' directories, built on first use; `build_pair` holds a lock, so workers wait for one builder."""
    from featstore.demo.pair import build_pair

    out = Path(os.environ.get("FEATSTORE_DEMO_CACHE", ROOT / ".cache" / "demo"))
    pair = build_pair(out, out / "assets")
    same = build_pair(out, out / "assets", same_tokenizer=True)
    return SimpleNamespace(smollm2=pair.source, twin=pair.target, twin_same=same.target)


@pytest.fixture(scope="session")
def small_models(tmp_path_factory):
    """The small model that comes with the package, and its untrained copy; nothing is downloaded."""
    from featstore.demo.small import build_small

    return build_small(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def untrained_store(small_models, tmp_path_factory) -> Path:
    """A store of the small model (first) and its untrained copy, on text of the sample; nothing is downloaded."""
    from tests.support.apart import quick_store

    return quick_store(small_models, tmp_path_factory.mktemp("untrained"))


@pytest.fixture(scope="session")
def apart_store(demo_models, small_models, tmp_path_factory) -> Path:
    """A store of a pair trained apart, SmolLM2 (first) and the small model, on text of the sample."""
    from tests.support.apart import write_store

    models = {"smollm2": demo_models.smollm2, "small": small_models.trained}
    return write_store(models, ("smollm2=0,15,30", "small=0,2,4"), tmp_path_factory.mktemp("apart"))


def lively(model, seed: int, sink: int):
    """Give a random model weights under which blocks matter, gains differ and one token is an attention sink.

    As in real models the sink's state is large along one dimension, and the last norm mutes that: with tied weights the
    model would otherwise say the sink every other time.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 2.0, generator=generator)
            elif "embed" in name:
                parameter.normal_(std=1.0, generator=generator)
            else:
                # What a block adds outweighs what it adds it to, or a model with tied weights repeats the last token.
                gain = 2.0 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                parameter.normal_(std=gain * parameter.shape[-1] ** -0.5, generator=generator)
        embeddings = model.model.embed_tokens.weight
        embeddings[sink] = 0
        embeddings[sink, 0] = 50 * embeddings.shape[1] ** 0.5
        model.model.norm.weight[0] = 0.01
    return model.eval()


@pytest.fixture(scope="session")
def byte_level_tokenizer(sample_texts):
    """A tokenizer like SmolLM2's: byte-level, no start token."""
    from tests.support.tokenizers import train_byte_level

    return train_byte_level(sample_texts)


@pytest.fixture(scope="session")
def start_token_tokenizer(sample_texts):
    """A tokenizer like Mistral's: byte fallback, "▁" for spaces, a start token."""
    from tests.support.tokenizers import train_with_start_token

    return train_with_start_token(sample_texts)


@pytest.fixture(scope="session")
def tiny_llama(byte_level_tokenizer, tmp_path_factory) -> Path:
    """A random Llama of 3 blocks and width 48 without a start token, whose newline token is a sink."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(byte_level_tokenizer),
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TINY_CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    [newline] = byte_level_tokenizer("\n", add_special_tokens=False)["input_ids"]
    # Under this seed the model's own states predict the text better than their mean does, at every layer.
    model = lively(LlamaForCausalLM(config), 25, sink=newline)
    return save_with_tokenizer(model, tmp_path_factory.mktemp("tiny") / "llama", byte_level_tokenizer)


@pytest.fixture(scope="session")
def tiny_mistral(start_token_tokenizer, tmp_path_factory) -> Path:
    """A random Mistral of 4 blocks and width 32 with a short sliding window; its start token is a sink."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=len(start_token_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TINY_CONTEXT,
        sliding_window=TINY_SLIDING_WINDOW,
        tie_word_embeddings=True,
    )
    model = lively(MistralForCausalLM(config), 2, sink=start_token_tokenizer.bos_token_id)
    return save_with_tokenizer(model, tmp_path_factory.mktemp("tiny") / "mistral", start_token_tokenizer)


@pytest.fixture(scope="session")
def sample_texts() -> list[str]:
    """The texts of the committed Wikipedia sample."""
    from featstore.demo.sample import sample_path

    return [json.loads(line)["text"] for line in gzip.decompress(sample_path().read_bytes()).splitlines()]


@pytest.fixture(scope="session")
def short_corpus(sample_texts, tmp_path_factory) -> Path:
    """30 short real documents as JSON lines."""
    path = tmp_path_factory.mktemp("corpus") / "short.jsonl"
    path.write_text("".join(json.dumps({"text": text[:900]}) + "\n" for text in sample_texts[:30]), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_store(tiny_llama, tiny_mistral, short_corpus, tmp_path_factory) -> Path:
    """A complete store of both tiny models: three layers each, hot layout, several shards of two chunks."""
    from featstore.extraction.job import prepare
    from featstore.extraction.run import extract
    from featstore.extraction.settings import Settings

    path = tmp_path_factory.mktemp("store") / "tiny.zarr"
    settings = Settings(
        model=(f"llama={tiny_llama}", f"mistral={tiny_mistral}"),
        layers=("llama=0,2,3", "mistral=0,2,4"),
        dataset=f"jsonl:{short_corpus}",
        store=path,
        max_tokens=None,
        window_bytes=512,
        batch_tokens=1024,
        shard_rows=2048,
        device="cpu",
    )
    extract(prepare(settings, quiet=True), quiet=True)
    return path


@pytest.fixture(scope="session")
def run_cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `featstore`, `align` or `evaluate` as users do and return exit code, stdout and stderr."""

    def run(command: str, *args: object, timeout: float = 900, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command_line(command, *args),
            env=command_environment(**env),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=timeout,
            check=False,
        )

    return run
