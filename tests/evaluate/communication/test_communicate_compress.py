"""Communication through maps of windows: what is put in, what it costs and what is not there; what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import evaluate.communication.communicate as module
from align.compress import fit as compress_fit
from align.maps.fitted import load_adapter
from align.runs.train import train
from align.settings import LoopSettings, Settings
from evaluate.communication.asking import PutIn, ask
from evaluate.communication.communicate import COMMON, describe, prepare
from evaluate.communication.messages import read
from evaluate.communication.tasks.base import Example, Task
from evaluate.communication.tasks.named import make
from evaluate.injection.loading import Loaded, load
from evaluate.injection.wire import crossing, wire
from featstore.errors import AdapterError, ModelLoadError, SpecError
from featstore.runtime.console import jsonable
from tests.support.commands import strict_json

KEY = "llama:2->mistral:2"
NAMES = ("aligned", "aligned_random", "aligned_shuffled")
#: Longer than the 512 bytes of a window of the store, so that the map reads it in pieces.
LONG = "It rained in the north, and the river rose over its banks by the hour. " * 9


@pytest.fixture(scope="module")
def run(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    directory = tmp_path_factory.mktemp("compress") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress_fit, "EPOCH_STEPS", 4)
        loop = LoopSettings(latents=16, latent_dim=16, epochs=1, tracker="none")
        train(Settings(str(tiny_store), "compress", layers="2", loop=loop), directory, quiet=True)
    adapter = load_adapter(directory)
    models = {name: load(adapter, name, (), device="cpu", quiet=True) for name in ("llama", "mistral")}
    return SimpleNamespace(adapter=adapter, models=models)


@pytest.fixture(scope="module")
def task() -> Task:
    short = make("countries", 3, seed=2).examples
    return Task("mixed", (*short, Example(LONG.strip(), "Where did it rain?", ("the north",))))


@pytest.fixture(scope="module")
def found(run: SimpleNamespace, task: Task) -> SimpleNamespace:
    """A result, what was put in, and the progress."""
    seen: dict[str, Any] = {}
    ticks: list[float] = []
    work: list[float] = []

    def spy(loaded: Loaded, prompts: Any, put_in: Mapping[str, PutIn | None], **rest: Any) -> Any:
        seen.update({name: (prompts, given) for name, given in put_in.items()})
        return ask(loaded, prompts, put_in, **rest)

    @contextmanager
    def counted(label: str, total: float, unit: str, *, quiet: bool) -> Iterator[Any]:
        work.append(total)
        yield ticks.append

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ask", spy)
        patch.setattr(module, "progress", counted)
        result = prepare(run.adapter, max_new_tokens=3, form="fp8", models=run.models, quiet=True).result(task)
    return SimpleNamespace(result=result, entry=result["tasks"]["mixed"], seen=seen, done=sum(ticks), work=sum(work))


def test_a_map_of_windows_has_aligned_and_its_controls_alone(found: SimpleNamespace) -> None:
    entry = found.entry
    assert list(entry["conditions"]) == [*COMMON, *(f"{name} {KEY}" for name in NAMES)]
    assert entry["reasons"] == {
        f"replace, sum, mean {KEY}": "the map reads windows of states and makes nothing of a single one"
    }
    assert {name: set(block) for name, block in entry["gains"].items()} == {
        f"aligned {KEY}": {"silent", "random", "shuffled"}
    }
    about = [w["where"] for w in entry["warnings"] if w["code"] == "no-better-than-control"]
    assert all((where["pair"], where["way"]) == (KEY, "aligned") for where in about)
    # The work announced is the work done.
    assert found.done == found.work == 4 * (3 + 3)
    text = describe(found.result)
    assert f"replace, sum, mean {KEY}: not run, the map reads windows" in text
    assert "numbers in the map; 16 latents of 16 numbers a window, " in text
    strict_json(json.dumps(jsonable(found.result)))


def test_what_travels_are_the_latents_of_all_windows(run: SimpleNamespace, found: SimpleNamespace, task: Task) -> None:
    sizes = [len(e.context.encode()) for e in task.examples]
    assert 512 < sizes[-1] < 1024
    latent = 16 * 16 * 2
    # Three examples of one window, one of two; the format of states is not that of latents.
    assert {found.entry["conditions"][f"{name} {KEY}"]["bytes"] for name in NAMES} == {latent * 5 / 4}
    about = found.entry["pairs"][KEY]
    rate = about["rate"]
    assert (rate["windows"], rate["latents"], rate["latent_dim"], rate["latent_bytes"]) == (5, 16, 16, latent)
    assert rate["text_bytes"] * 5 == pytest.approx(sum(sizes))
    assert rate["latent_bytes_per_text_byte"] == pytest.approx(latent * 5 / sum(sizes))
    assert about["map_numbers"] == run.adapter.aligners[KEY].shipped


def test_the_context_takes_what_the_map_makes_of_it(run: SimpleNamespace, found: SimpleNamespace, task: Task) -> None:
    put = {name: found.seen[f"{name} {KEY}"][1] for name in NAMES}
    assert {(given.layer, given.how, given.keep) for given in put.values()} == {(2, "aligned", "hide")}
    contexts = [e.context for e in task.examples]
    sizes = [len(text.encode()) for text in contexts]
    there, here = (read(run.models[name], contexts, [0] * 4, sizes, (2,)) for name in ("llama", "mistral"))
    to = wire(run.adapter, run.adapter.aligners[KEY])
    mapped = []
    for i, (a, b) in enumerate(zip(there, here, strict=True)):
        text = crossing(a.window, b.window, a.sink, b.sink)
        wanted = to.states(a.states[2], text, to.pieces(contexts[i]))
        mapped.append(wanted)
        # Not rounded to the format, which is that of states.
        np.testing.assert_allclose(put["aligned"].states[i], wanted, atol=1e-5)
        assert found.seen[f"aligned {KEY}"][0][i].places == tuple(text.places)
        noise = put["aligned_random"].states[i]
        np.testing.assert_allclose(*(np.linalg.norm(x, axis=1) for x in (noise, wanted)), rtol=1e-4)
    assert not np.allclose(mapped[3], to.states(there[3].states[2], text), atol=1e-3)
    for i, foreign in enumerate(put["aligned_shuffled"].states):
        others = [j for j in range(4) if not set(task.examples[i].answers) & set(task.examples[j].answers)]
        stretched = [
            put["aligned"].states[j][np.linspace(0, len(mapped[j]) - 1, len(foreign)).round().astype(int)]
            for j in others
        ]
        assert sum(np.array_equal(foreign, x) for x in stretched) == 1


def test_the_identity_beside_it_has_every_condition(run: SimpleNamespace) -> None:
    task = make("tipsheets", 2)
    entries = prepare(run.adapter, itself=True, models=run.models, quiet=True).result(task)["tasks"]
    one, own = (entries[f"tipsheets ({source}->mistral)"] for source in ("llama", "mistral"))
    assert len(one["conditions"]) == 3 + 3
    assert len(own["conditions"]) == 3 + 12
    assert "rate" not in own["pairs"]["mistral:2->mistral:2"]
    assert own["reasons"] == {}


# What is refused.


def test_a_map_that_does_not_fit_its_card_is_refused(run: SimpleNamespace) -> None:
    entries = run.adapter.card["models"]
    card = {**run.adapter.card, "models": {**entries, "llama": {**entries["llama"], "width": 64}}}
    with pytest.raises(AdapterError, match=r"the map has width 48 for 'llama', the card of .* says 64; train it again"):
        prepare(replace(run.adapter, card=card), models=run.models, quiet=True).result(make("lookup", 2))
    with pytest.raises(AdapterError, match=r"model 'llama' \(.*\) has width 48, the run was fitted to 64; point"):
        load(replace(run.adapter, card=card), "llama", (), device="cpu", quiet=True)


def test_a_model_that_is_not_there_is_named(run: SimpleNamespace, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    with pytest.raises(ModelLoadError, match="gone") as caught:
        prepare(run.adapter, overrides=(f"llama={gone}",), device="cpu", quiet=True).result(make("lookup", 2))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("who", ["source", "target"])
def test_a_context_longer_than_either_model_is_refused(run: SimpleNamespace, who: str) -> None:
    name = {"source": "llama", "target": "mistral"}[who]
    info = replace(run.models[name].info, context=60)
    models = {**run.models, name: replace(run.models[name], info=info)}
    task = Task("long", (Example(LONG, "Where?", ("there",)),))
    with pytest.raises(SpecError, match=rf"exceeds the context of '{name}' \(60\); use shorter examples"):
        prepare(run.adapter, models=models, quiet=True).result(task)
