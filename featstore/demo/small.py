"""A small model that was trained apart from every other, and the same network before it learnt anything.

The trained one comes with this package: a Llama of width 192 and four blocks with a tokenizer of its own, trained on
the openings of Wikipedia articles (:mod:`featstore.demo.training`; ``NOTICE.md`` beside the weights names text and
licence). With a model of someone else's it is a pair of which no answer is planted. The untrained one has its
architecture and its tokenizer and random weights: what a method finds between that and any model is in the text and in
the tokens, not in anything learnt.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from hashlib import sha256
from importlib import resources
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from featstore.demo.building import WEIGHTS, is_built, locked, replacing, require_space, save_model
from featstore.demo.sample import sample_path
from featstore.errors import CorruptDataError
from featstore.models.references import ModelSpec
from featstore.models.trust import remember
from featstore.runtime.console import err

#: The shipped files that make the model what it is.
SHA256 = {
    WEIGHTS: "f11bb648c3e0e8ff523822937b0a41a8bb5792fd7246ee68b00a07158b60d7e5",
    "tokenizer.json": "59884c9bef92a74d4b2d8b2651a26f4ffcbae25a7db567901298ce256a96ca41",
}
_CONFIGURATION = "config.json"
_BESIDE = ("tokenizer.json", "tokenizer_config.json", "NOTICE.md")
_LICENCE = "CC-BY-SA-4.0"
_NEEDED_BYTES = 20_000_000
#: Keeps the untrained weights apart from those that training began with.
_FIRST_SEED = 1_000_000


@dataclass(frozen=True)
class SmallModels:
    """Two model directories.

    Attributes:
        trained: The small model.
        untrained: The same architecture and tokenizer with random weights.
        seed: What those were drawn with.
    """

    trained: Path
    untrained: Path
    seed: int

    @property
    def models(self) -> dict[str, Path]:
        """Both directories by the names that the demo gives them, as ``featstore.extract(models=...)`` takes them."""
        return {"small": self.trained, "untrained": self.untrained}

    @property
    def dataset(self) -> str:
        """Text that the small model was not trained on, as ``featstore.extract(dataset=...)`` takes it."""
        return f"jsonl:{sample_path()}"


def shipped_path() -> Path:
    """The trained model's directory within this package."""
    return Path(str(resources.files("featstore") / "data" / "small"))


def build_small(out: Path, *, seed: int = 0) -> SmallModels:
    """Copy the trained model out of the package and draw an untrained one beside it; nothing is downloaded.

    A directory appears complete or not at all, and is left as it is where it has been built already.

    Args:
        out: Where the model directories go: ``small`` and ``small-untrained``, 7 MB each.
        seed: Draws the untrained weights.

    Raises:
        CorruptDataError: A file in the package is not the one that was released.
        NoSpaceError: The disk is too full.
    """
    trained, untrained = out / "small", out / "small-untrained"
    trained_card = {"kind": "small", "sha256": SHA256, "licence": _LICENCE}
    untrained_card = {**trained_card, "kind": "small-untrained", "seed": seed}
    with locked(out):
        if not (is_built(trained, trained_card) and is_built(untrained, untrained_card)):
            require_space(out, _NEEDED_BYTES, "the small models")
            _check(shipped_path())
        if not is_built(trained, trained_card):
            err.print(f"copying the small model to {trained}")
            with replacing(trained, trained_card) as aside:
                for path in sorted(shipped_path().iterdir()):
                    shutil.copyfile(path, aside / path.name)
        if not is_built(untrained, untrained_card):
            err.print(f"drawing untrained weights into {untrained}")
            with replacing(untrained, untrained_card) as aside:
                _write_untrained(aside, seed)
    remember(
        [ModelSpec(kind, str(place)) for kind, place in (("trained", trained), ("untrained", untrained))], quiet=True
    )
    return SmallModels(trained=trained, untrained=untrained, seed=seed)


def _check(shipped: Path) -> None:
    for name, expected in SHA256.items():
        found = sha256((shipped / name).read_bytes()).hexdigest()
        if found != expected:
            raise CorruptDataError(
                f"{shipped / name} has SHA-256 {found}, expected {expected}: install featstore again"
            )


def _write_untrained(into: Path, seed: int) -> None:
    config = LlamaConfig.from_pretrained(shipped_path())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_FIRST_SEED + seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    save_model(into, config, {name: tensor.to(torch.float16) for name, tensor in model.state_dict().items()})
    for name in _BESIDE:
        shutil.copyfile(shipped_path() / name, into / name)
