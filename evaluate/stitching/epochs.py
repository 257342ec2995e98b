"""What a map does to the target model, epoch by epoch, for `align train --eval-models`.

`align` may not know this room. It asks for whatever is installed under the entry point group
``align.epoch_evaluation``, and this is what is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from align.layers import LayerPair
from align.maps.fitted import Adapter, Aligner
from align.tokens.table import TokenTable
from evaluate.generation.generate import PROMPTS, generate
from evaluate.injection.loading import Loaded, load
from evaluate.stitching.stitch import stitch
from featstore.models.probe.prove import Needs
from featstore.models.probe.refusals import refuse_injecting
from featstore.store import Store
from featstore.text.splits import VALIDATION

#: Enough for a trend; the figure to report is `evaluate stitch` on the test split.
_TOKENS = 1000
_NEW_TOKENS = 24
#: Every control is a pass over the text; these are what a map amounts to that adds nothing to the token, or to nothing.
_CONTROLS = ("token", "mean", "shuffled")


class EpochEvaluation:
    """Holds both models while a run trains.

    Args:
        store: The store that the run is fitted from.
        card: The run's card: models, store, mask.
        token: What the run predicts from the source's token alone for a layer pair, or why it does not; None where
            nobody knows.
        device: Where the models run.
        seed: Of the random controls.
        quiet: No progress.
    """

    def __init__(
        self,
        store: Store,
        card: Mapping[str, Any],
        *,
        token: Callable[[LayerPair], TokenTable | str] | None = None,
        device: str = "auto",
        seed: int = 0,
        quiet: bool = False,
    ) -> None:
        self._token = token or (lambda _: "the run gave no predictions from the token alone")
        self._store, self._seed, self._quiet, self._device = store, seed, quiet, device
        self._card = dict(card)
        self._models: dict[str, Loaded] = {}

    def __call__(self, aligner: Aligner) -> dict[str, Any]:
        """Stitched loss on validation documents and a continuation of each of five prompts.

        Args:
            aligner: An epoch's map.

        Returns:
            ``{"stitched": the pair's part of a stitch.json, "generations": [{"prompt", "text", "target_alone"}]}``.

        Raises:
            AdapterError: A model at hand is not the one that the store was made with, or the map cannot be injected.
            ModelLoadError: A model cannot be loaded.
            ProbeError: The target's layer has a side channel.
        """
        key = aligner.pair.key
        adapter = Adapter(Path(), self._card, {key: aligner})
        for name in dict.fromkeys((aligner.pair.source, aligner.pair.target)):
            if name not in self._models:
                self._models[name] = load(adapter, name, (), device=self._device, quiet=self._quiet)
        pair = aligner.pair
        target = self._models[pair.target].tested(Needs(continuing=True, layers=(pair.target_layer,)))
        refuse_injecting(
            pair.target, target.verdict, (pair.target_layer,), remedy="leave --eval-models out or choose other --layers"
        )
        shared: dict[str, Any] = {"models": self._models, "seed": self._seed, "quiet": True}
        scored: dict[str, Any] = {"split": VALIDATION, "max_tokens": _TOKENS, "controls": _CONTROLS}
        stitched = stitch(self._store, adapter, tokens={key: self._token(pair)}, **scored, **shared)
        texts = generate(adapter, PROMPTS, max_new_tokens=_NEW_TOKENS, conditions=("mapped",), **shared)
        generations = [
            {
                "pair": key,
                "prompt": entry["prompt"],
                "text": entry["source_to_target"][key]["mapped"],
                "target_alone": entry["target_alone"],
            }
            for entry in texts["entries"]
        ]
        return {"stitched": stitched["pairs"][key], "generations": generations}
