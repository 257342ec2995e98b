"""What `import evaluate` offers: the commands as functions, and states injected into a loop of one's own.

The keywords of a function are the flags of its command, with the same defaults, checks and errors; the commands call
these functions. Where a command loads models, a function also takes models that are loaded already
(:func:`load_models`), so that a notebook loads them once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from featstore.errors import SpecError
from featstore.runtime.arguments import Layers, as_path, layers_text, several, shown, typed, whole
from featstore.runtime.console import check_directory, jsonable
from featstore.runtime.extras import extras_named
from featstore.runtime.quantities import parse_budget
from featstore.text.splits import SPLITS

if TYPE_CHECKING:
    from align.maps.fitted import Adapter
    from evaluate.injection.live import LiveInjection
    from evaluate.injection.loading import Loaded
    from evaluate.notebook.answers import CommunicateResult
    from evaluate.notebook.page import ReportResult
    from evaluate.notebook.stitched import StitchResult
    from evaluate.notebook.texts import GenerateResult
    from featstore.models.references import Allowed
    from featstore.store import Store

__all__ = ["communicate", "generate", "inject", "load_models", "report", "stitch"]


@runtime_checkable
class HasPath(Protocol):
    """A run of `align`, which knows its directory."""

    @property
    def path(self) -> Any:
        """The run directory."""


#: A run directory, or an object with a ``path``.
Run = str | PathLike[str] | HasPath
#: ``auto``, ``balanced``, a JSON file, or what it holds: devices by module, or such maps by model.
DeviceMap = str | PathLike[str] | Mapping[str, Any]
#: Models of a run: ``NAME=REF`` texts, or by name where a model moved to, or the model itself.
ModelsGiven = Sequence[str] | Mapping[str, Any]


@extras_named("evaluate")
def load_models(
    run: Run,
    *,
    models: ModelsGiven | None = None,
    device: str = "auto",
    device_map: DeviceMap | None = None,
    dtype: str = "auto",
    yes: bool = False,
    allow_pickle_weights: bool = False,
    quiet: bool = False,
) -> dict[str, Loaded]:
    """Load the models of a run once, for as many calls as follow.

    Args:
        run: Run directory of `align train`, or an object with its ``path``.
        models: ``NAME=REF`` for models that moved, or a mapping from names to references or to models that are loaded.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``.
        device_map: For models larger than one device, instead of ``device``: ``auto``, ``balanced``, a JSON file, or
            what it holds.
        dtype: Compute dtype: ``auto``, ``bfloat16``, ``float16``, ``float32``.
        yes: Load models that the run's card names and you have not named; they are shown.
        allow_pickle_weights: Read pickled weights, which can run code, where a model has no others.
        quiet: Do not print that weights are being loaded.

    Returns:
        By name, to be given as ``models=`` to the other functions. The transformers model is ``.model``, its tokenizer
        ``.info.tokenizer``.

    Raises:
        AdapterError: The run is damaged, or a model is not the one it was fitted to.
        ModelLoadError: A model is not at hand.
        StrangeReferenceError: The run's card names a model that you have not named.
        SpecError: The run has no such model, or the device or dtype is unknown.
    """
    from evaluate.injection.loading import Models, check_card, choose
    from featstore.models.devices import parse_device_map

    adapter = _adapter(run)
    check_card(adapter)
    names = [name for a in choose(adapter, None) for name in (a.pair.source, a.pair.target)]
    allowed = _allowed(yes, allow_pickle_weights)
    overrides, given = _models(adapter, models, allowed)
    places = parse_device_map(device_map)
    where: dict[str, Any] = {"device": device, "dtype": dtype, "device_map": places}
    needed = Models(adapter, names, overrides, **where, quiet=quiet, given=given, allowed=allowed)
    return needed.load_all()


@extras_named("evaluate")
def inject(
    model: Any,
    run: Run,
    *,
    key: str | None = None,
    states: Any = None,
    mapped: Any = None,
    positions: Any = None,
    text: str | Sequence[str] | None = None,
    source: Any = None,
    keep: str = "own",
    allow_side_channel: bool = False,
    yes: bool = False,
) -> LiveInjection:
    """Put states of another model into the forward passes of a target, in a loop of one's own.

    >>> import align, evaluate, torch
    >>> run = align.train("wt103.zarr", layers="50%", quiet=True)
    >>> models = evaluate.load_models(run, device="cpu", quiet=True)
    >>> [(key, fitted)] = run.maps.items()
    >>> loaded = models[fitted.pair.target]
    >>> target, ids = loaded.model, loaded.info.tokenizer("The capital of France", return_tensors="pt").input_ids
    >>> states = torch.zeros(2, fitted.widths[0])
    >>> with torch.no_grad(), evaluate.inject(target, run, states=states, positions=[1, -1]) as injection:
    ...     logits = target(ids).logits
    >>> injection.key == key, injection.passes, torch.equal(logits, target(ids).logits)
    (True, 1, False)

    The run's map takes the source states to the target's space, and they replace the target's residual stream at the
    chosen positions of the map's layer. Every pass in the context that begins a sequence takes them; the steps of
    cached generation that follow take none. On exit the model is as it was, also after an error. Nothing is detached or
    switched: the passes run under the caller's own gradient mode.

    There are three ways to say what is injected:

    - ``states`` and ``positions``: source states, which go through the map without gradients (for those, map them by
      ``align.load(run)[key].transform`` and give them as ``mapped``). A map of windows (``compress``) needs text.
    - ``mapped`` and ``positions``: states of the target's own space, which are put in as they are: a control, a steered
      state, or the target's own state. Gradients flow into them.
    - ``text`` and ``source``: the source reads the text, and every target position takes the mapped state of the last
      ordinary source token that ends at or before it, as in `evaluate generate`. Call the target as
      ``target(**injection.inputs)``.

    Args:
        model: The target: a transformers causal language model, or one from :func:`load_models`.
        run: Run directory of `align train`, or an object with its ``path``.
        key: The layer pair, such as ``"llama:16->mistral:16"``; not needed for a run with one map.
        states: Source states ``(n, d_source)``, numpy or torch, of a joint map those of its layers end to end; for a
            batch one such array for each prompt.
        mapped: The same in the target's space, ``(n, d_target)``.
        positions: The n target positions that take them, padding counted, negative ones from the end; for a batch one
            list for each prompt.
        text: Texts that source and target both read.
        source: The source model, with ``text``; not needed where source and target are one model.
        keep: What later blocks read of positions that take no state: ``own``, the target's own states, or ``hide``,
            nothing (the start token excepted). Under ``hide`` the token from which generation starts must take a state;
            otherwise its own state tells what is hidden.
        allow_side_channel: Inject at a layer although later blocks learn of the text past the stream there.
        yes: Of a model that was made in memory, read the tokenizer that the run's card names though you have not named
            it.

    Returns:
        A context; it says what was put where (``key``, ``layer``, ``states``, ``positions``), how many passes took it
        (``passes``), and what the swap test found at the layer (``leak``). It warns on exit if none did.

    Raises:
        AdapterError: States have another width than the map takes, the map reads windows, or a model is not the run's.
        LayerRangeError: The model has no such layer.
        NonFiniteStateError: During a pass: a state holds NaN or infinity.
        ProbeError: The layer has a side channel, or ``hide`` does not hide there.
        SpecError: An unknown key, arguments that do not fit each other, or, during a pass, a position outside it.
        UnsupportedArchitectureError: The model has no decoder blocks, or with ``hide`` no mask can reach them.
    """
    from evaluate.injection.own_loop import live_injection

    return live_injection(
        model,
        _adapter(run),
        key=key,
        states=states,
        mapped=mapped,
        positions=positions,
        text=text,
        source=source,
        keep=keep,
        allow_side_channel=allow_side_channel,
        allowed=_allowed(yes),
    )


@extras_named("evaluate")
def stitch(
    store: str | PathLike[str] | Store,
    run: Run,
    *,
    layers: Layers | None = None,
    split: str = "test",
    max_tokens: str | int | None = "20k",
    keep: str = "own",
    roles: str | Iterable[str] | None = None,
    source_alone: bool = False,
    allow_side_channel: bool = False,
    models: ModelsGiven | None = None,
    device: str = "auto",
    device_map: DeviceMap | None = None,
    dtype: str = "auto",
    yes: bool = False,
    allow_pickle_weights: bool = False,
    seed: int = 0,
    out: str | PathLike[str] | None = None,
    write: bool = True,
    quiet: bool = False,
) -> StitchResult:
    """Measure the target's loss when a layer's states come from the source through the map, with controls.

    >>> import align, evaluate
    >>> run = align.train("wt103.zarr", layers="50%", quiet=True)
    >>> result = evaluate.stitch("wt103.zarr", run, max_tokens=60, device="cpu", quiet=True)
    >>> [pair] = result.pairs.values()
    >>> pair.conditions["self"].nats_per_token == pair.conditions["clean"].nats_per_token
    True

    Args:
        store: The store that the run was fitted from: its path, or an open one.
        run: Run directory of `align train`, or an object with its ``path``.
        layers: Only the maps of these source layers: ``"8,16"``, ``16`` or ``[8, 16]``; None for all.
        split: ``train``, ``val`` or ``test``.
        max_tokens: Maximum number of target tokens: a number, ``"20k"``, or ``"all"`` (or None).
        keep: What later blocks read of positions that take no state: ``own``, the target's own states, or ``hide``,
            nothing but the start token, which a model that has none of its own is given.
        roles: Score only target tokens of these roles: ``"assistant"``, ``["user", "assistant"]``, or ``"all"``; None
            for the roles that the run was fitted to. States are put in at all positions, whatever their roles.
        source_alone: Also load the source model and score it by itself.
        allow_side_channel: Take layers at which later blocks learn of the text past the stream; the leak stands beside
            every figure.
        models: ``NAME=REF`` for models that moved, or a mapping from names to references or to models that are loaded.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``.
        device_map: For models larger than one device, instead of ``device``: ``auto``, ``balanced``, a JSON file, or
            what it holds.
        dtype: Compute dtype: ``auto``, ``bfloat16``, ``float16``, ``float32``.
        yes: Load models that the run's card names and you have not named; they are shown.
        allow_pickle_weights: Read pickled weights, which can run code, where a model has no others.
        seed: Seed of the random controls; 0 or more.
        out: Directory for ``stitch.json`` and ``stitch_documents.json``; the run directory by default.
        write: Write ``stitch.json``, from which :func:`report` reads, and its sums by document beside it.
        quiet: Show no progress.

    Raises:
        AdapterError: The run was fitted from another store, does not fit a model, or is damaged.
        ModelLoadError: A model is not at hand.
        StrangeReferenceError: The run's card names a model that you have not named.
        PairingError: The split has no window to score, or none with tokens of these roles.
        ProbeError: A layer has a side channel, or ``hide`` does not hide there.
        SpecError: An argument is outside its range.
    """
    from evaluate.notebook.stitched import StitchResult
    from evaluate.results import StitchedDocuments, write_stitch, write_stitch_documents
    from evaluate.stitching import stitch as stitching
    from featstore.models.devices import parse_device_map
    from featstore.store import Store, open_store

    if split not in SPLITS:
        raise SpecError(f"split {split!r}: choose one of {', '.join(SPLITS)}")
    seed = whole("seed", seed, 0)
    _check_out(out)
    opened = store if isinstance(store, Store) else open_store(_location(store))
    adapter = _adapter(run)
    _check_place(adapter, out, write=write)
    allowed = _allowed(yes, allow_pickle_weights)
    overrides, given = _models(adapter, models, allowed)
    result, sums = stitching.measure(
        opened,
        adapter,
        layers=layers_text(layers),
        overrides=overrides,
        device=device,
        device_map=parse_device_map(device_map),
        dtype=dtype,
        split=SPLITS.index(split),
        max_tokens=None if max_tokens is None else parse_budget(str(max_tokens)),
        keep=keep,
        roles=roles,
        source_alone=source_alone,
        seed=seed,
        models=given,
        allow_side_channel=typed("allow_side_channel", allow_side_channel, "bool"),
        allowed=allowed,
        quiet=quiet,
    )
    record = StitchResult.parse(jsonable(result))
    documents = StitchedDocuments.parse(jsonable(sums))
    if not write:
        return record.with_documents(documents)
    place = _place(adapter, out)
    # The sums first: where `stitch.json` is, they are.
    write_stitch_documents(place, documents)
    return record.at(write_stitch(place, record)).with_documents(documents)


@extras_named("evaluate")
def generate(
    run: Run,
    prompts: str | PathLike[str] | Sequence[str] | None = None,
    *,
    layers: Layers | None = None,
    max_new_tokens: int = 32,
    sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    allow_side_channel: bool = False,
    models: ModelsGiven | None = None,
    device: str = "auto",
    device_map: DeviceMap | None = None,
    dtype: str = "auto",
    yes: bool = False,
    allow_pickle_weights: bool = False,
    seed: int = 0,
    out: str | PathLike[str] | None = None,
    write: bool = True,
    quiet: bool = False,
) -> GenerateResult:
    """Continue prompts in four conditions (each model alone, and each direction through the map), with controls.

    Args:
        run: Run directory of `align train`, or an object with its ``path``.
        prompts: A prompt or several; a ``Path`` is a file with one prompt a line; None for the five default ones.
        layers: Only the maps of these source layers: ``"8,16"``, ``16`` or ``[8, 16]``; None for all.
        max_new_tokens: Length of each continuation.
        sample: Draw tokens instead of taking the likeliest.
        temperature: Divides the logits; needs ``sample``.
        top_p: Draw from the fewest likeliest tokens that together have this probability; needs ``sample``.
        allow_side_channel: Take layers at which later blocks learn of the text past the stream; the leak stands beside
            every figure.
        models: ``NAME=REF`` for models that moved, or a mapping from names to references or to models that are loaded.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``.
        device_map: For models larger than one device, instead of ``device``: ``auto``, ``balanced``, a JSON file, or
            what it holds.
        dtype: Compute dtype: ``auto``, ``bfloat16``, ``float16``, ``float32``.
        yes: Load models that the run's card names and you have not named; they are shown.
        allow_pickle_weights: Read pickled weights, which can run code, where a model has no others.
        seed: Seed of sampling and of the random controls; 0 or more.
        out: Directory for ``generations.json``; the run directory by default.
        write: Write ``generations.json``, from which :func:`report` reads.
        quiet: Show no progress.

    Raises:
        AdapterError: The run is damaged or does not fit a model.
        ModelLoadError: A model is not at hand.
        StrangeReferenceError: The run's card names a model that you have not named.
        ProbeError: A layer has a side channel, or a model cannot go on from a prompt.
        SpecError: An argument is outside its range, or a prompt is empty or longer than a model's context.
    """
    from evaluate.generation import generate as generating
    from evaluate.notebook.texts import GenerateResult
    from evaluate.results import write_generations
    from featstore.models.devices import parse_device_map
    from featstore.models.sampling import Sampling

    if not sample and (temperature, top_p) != (1.0, 1.0):
        raise SpecError("--temperature and --top-p need --sample; give it, or leave them out")
    seed, max_new_tokens = whole("seed", seed, 0), whole("max_new_tokens", max_new_tokens, 1)
    temperature, top_p = typed("temperature", temperature, "float"), typed("top_p", top_p, "float")
    _check_out(out)
    adapter = _adapter(run)
    _check_place(adapter, out, write=write)
    texts = _prompts(prompts)
    allowed = _allowed(yes, allow_pickle_weights)
    overrides, given = _models(adapter, models, allowed)
    result = generating.generate(
        adapter,
        texts,
        layers=layers_text(layers),
        max_new_tokens=max_new_tokens,
        sample=Sampling(temperature, top_p, seed) if sample else None,
        overrides=overrides,
        device=device,
        device_map=parse_device_map(device_map),
        dtype=dtype,
        seed=seed,
        models=given,
        allow_side_channel=typed("allow_side_channel", allow_side_channel, "bool"),
        allowed=allowed,
        quiet=quiet,
    )
    record = GenerateResult.parse(jsonable(result))
    return record.at(write_generations(_place(adapter, out), record)) if write else record


@extras_named("evaluate")
def communicate(
    run: Run,
    task: str | Sequence[str] = "countries",
    *,
    examples: int = 50,
    layers: Layers | None = None,
    itself: bool = False,
    format: str = "bfloat16",  # noqa: A002 (the flag's name)
    summary_tokens: int = 16,
    max_new_tokens: int = 8,
    allow_side_channel: bool = False,
    models: ModelsGiven | None = None,
    device: str = "auto",
    device_map: DeviceMap | None = None,
    dtype: str = "auto",
    yes: bool = False,
    allow_pickle_weights: bool = False,
    seed: int = 0,
    out: str | PathLike[str] | None = None,
    write: bool = True,
    quiet: bool = False,
) -> CommunicateResult:
    """Ask the target what only the source has read: from its states, from text and from nothing, with controls.

    The models are loaded once, for all tasks.

    Args:
        run: Run directory of `align train`, or an object with its ``path``.
        task: ``countries``, ``tipsheets``, ``lookup``, ``lookup:PAIRS`` or ``jsonl:PATH``; or several of them.
        examples: Number of examples of each task; of a file, the maximum.
        layers: Only the maps of these source layers: ``"8,16"``, ``16`` or ``[8, 16]``; None for all.
        itself: Also let the target communicate with itself, with the identity as the map.
        format: Storage format in which states travel: ``bfloat16``, ``float16``, ``float32``, ``fp8``; latents of a
            compressed run travel as they are.
        summary_tokens: Length of the source's summaries.
        max_new_tokens: Length of each free answer.
        allow_side_channel: Take layers at which later blocks learn of the text past the stream; the leak stands beside
            every figure.
        models: ``NAME=REF`` for models that moved, or a mapping from names to references or to models that are loaded.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``.
        device_map: For models larger than one device, instead of ``device``: ``auto``, ``balanced``, a JSON file, or
            what it holds.
        dtype: Compute dtype: ``auto``, ``bfloat16``, ``float16``, ``float32``.
        yes: Load models that the run's card names and you have not named; they are shown.
        allow_pickle_weights: Read pickled weights, which can run code, where a model has no others.
        seed: Seed of the examples and the controls; 0 or more.
        out: Directory for ``communicate.json``; the run directory by default.
        write: Write ``communicate.json`` after each task, from which :func:`report` reads.
        quiet: Show no progress.

    Raises:
        AdapterError: The run is damaged or does not fit a model.
        ModelLoadError: A model is not at hand.
        StrangeReferenceError: The run's card names a model that you have not named.
        ProbeError: A layer has a side channel, or a model cannot go on from a prompt.
        SpecError: An argument is outside its range, or an example does not fit into a model.
    """
    from evaluate.communication.communicate import prepare
    from evaluate.communication.tasks.named import make
    from evaluate.notebook.answers import CommunicateResult
    from evaluate.results import write_communication
    from featstore.models.devices import parse_device_map

    seed, examples = whole("seed", seed, 0), typed("examples", examples, "int")
    summary_tokens = typed("summary_tokens", summary_tokens, "int")
    max_new_tokens = typed("max_new_tokens", max_new_tokens, "int")
    _check_out(out)
    names = [task] if isinstance(task, str) else several("task", task, "the name of a task, or several")
    # A mistyped task is refused before the wait for the weights.
    asked = [make(typed("task", name, "str"), examples, seed) for name in dict.fromkeys(names)]
    if not asked:
        raise SpecError("there is no task; name one at least, such as countries")
    adapter = _adapter(run)
    _check_place(adapter, out, write=write)
    allowed = _allowed(yes, allow_pickle_weights)
    overrides, given = _models(adapter, models, allowed)
    exchange = prepare(
        adapter,
        layers=layers_text(layers),
        itself=itself,
        form=format,
        summary_tokens=summary_tokens,
        max_new_tokens=max_new_tokens,
        overrides=overrides,
        device=device,
        device_map=parse_device_map(device_map),
        dtype=dtype,
        seed=seed,
        models=given,
        allow_side_channel=typed("allow_side_channel", allow_side_channel, "bool"),
        allowed=allowed,
        quiet=quiet,
    )
    tasks: dict[str, Any] = {}
    starts: dict[str, Any] = {}
    for each in asked:
        found = jsonable(exchange.result(each))
        tasks |= found["tasks"]
        starts |= found.get("start", {})
        record = CommunicateResult.parse({**found, "tasks": tasks, **({"start": starts} if starts else {})})
        if write:
            # After each task, so that an interruption costs one task.
            record.at(write_communication(_place(adapter, out), record))
    return record


@extras_named("page")
def report(dirs: Run | Iterable[Run], *, out: str | PathLike[str] = "report.html") -> ReportResult:
    """Write one self-contained HTML page of everything that was measured.

    Args:
        dirs: Run, CKA and sweep directories, in the order they are to appear.
        out: The page.

    Raises:
        AdapterError: A directory holds none of the files that a report shows.
        CorruptDataError: A file is there but is not JSON.
        SpecError: A directory is in the page's place, or its directory takes no files.
        WriteError: The page cannot be written there.
    """
    from evaluate.notebook.page import ReportResult
    from evaluate.reporting import write_report

    page = as_path("out", out)
    check_directory(page.parent, page)
    single = isinstance(dirs, (str, PathLike, HasPath))
    places: list[Any] = [dirs] if single else several("dirs", dirs, "run directories, or runs")
    if not places:
        raise SpecError("there is no directory to report on; give one at least")
    return ReportResult(**write_report([_directory(place) for place in places], page))


def _directory(run: Run) -> Path:
    if isinstance(run, (str, PathLike)):
        return Path(run)
    place = getattr(run, "path", None)
    if not isinstance(place, (str, PathLike)):
        raise SpecError(f"run {run!r}: give a run directory, or an object with its path")
    return Path(place)


def _adapter(run: Run) -> Adapter:
    from align.maps.fitted import load_adapter

    return load_adapter(_directory(run))


def _place(adapter: Adapter, out: str | PathLike[str] | None) -> Path:
    return adapter.directory if out is None else Path(out)


def _check_place(adapter: Adapter, out: str | PathLike[str] | None, *, write: bool) -> None:
    """Refuse a run directory that takes no results, before they are computed."""
    if write:
        check_directory(_place(adapter, out))


def _check_out(out: str | PathLike[str] | None) -> None:
    if out is not None:
        check_directory(as_path("out", out))


def _location(store: str | PathLike[str]) -> Path | str:
    """A URL stays text; everything else is a path."""
    return store if isinstance(store, str) and "://" in store else as_path("store", store)


def _prompts(prompts: str | PathLike[str] | Sequence[str] | None) -> tuple[str, ...]:
    from evaluate.generation.generate import read_prompts

    if prompts is None or isinstance(prompts, PathLike):
        return read_prompts(None if prompts is None else Path(prompts))
    wanted = "text, or the Path of a file with one prompt a line"
    texts = [prompts] if isinstance(prompts, str) else several("prompts", prompts, wanted)
    for text in texts:
        if not isinstance(text, str):
            raise SpecError(f"prompt {text!r}: give {wanted}")
    return tuple(texts)


def _allowed(yes: bool, pickles: bool = False) -> Allowed:
    from featstore.models.references import Allowed

    return Allowed(typed("yes", yes, "bool"), typed("allow_pickle_weights", pickles, "bool"))


def _models(adapter: Adapter, given: ModelsGiven | None, allowed: Allowed) -> tuple[tuple[str, ...], dict[str, Loaded]]:
    """What ``models`` says: where models moved to, and models that are loaded."""
    from evaluate.injection.loading import adopt, check_card

    if given is None:
        return (), {}
    if isinstance(given, str) or not isinstance(given, (Mapping, Sequence)):
        raise SpecError(f"models {given!r}: give a list of NAME=REF, or a mapping from names to references or models")
    if not isinstance(given, Mapping):
        for each in given:
            if not isinstance(each, str):
                raise SpecError(
                    f"models [{shown(each)}]: a list has NAME=REF; give a loaded model as {{'NAME': model}}"
                )
        return tuple(given), {}
    moved = tuple(f"{name}={value}" for name, value in given.items() if isinstance(value, (str, PathLike)))
    loaded = {name: value for name, value in given.items() if not isinstance(value, (str, PathLike))}
    if loaded:
        check_card(adapter)
    return moved, {name: adopt(adapter, name, model, allowed) for name, model in loaded.items()}
