"""What `import align` offers: the commands as functions, whose results print and draw themselves in a notebook.

Keywords are the options of the commands, with the same defaults, checks and errors; the commands `align cka` and
`align compare`, with `--changes` and without, call these functions.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from align.notebook.changes import Changes
from align.notebook.keywords import OPTIONS, bytes_of, make_settings
from align.notebook.leaderboard import Leaderboard
from align.notebook.maps import Map, Maps
from align.notebook.run import Run
from align.notebook.similarity import Similarity
from align.settings import Settings
from featstore.errors import SpecError
from featstore.runtime.arguments import Layers, as_path, check_keywords, layers_text, several, typed, whole
from featstore.runtime.console import check_directory, jsonable
from featstore.runtime.extras import extras_named
from featstore.runtime.writing import check_folder
from featstore.store import Store, open_store

if TYPE_CHECKING:
    import torch
    from numpy.typing import ArrayLike

__all__ = ["Changes", "Leaderboard", "Map", "Maps", "Run", "Similarity", "changes", "cka", "compare", "load", "train"]

#: A store: its path or URL, or an open one.
StoreGiven = str | os.PathLike[str] | Store
#: A run directory, or a :class:`Run`, which is a path as well.
RunGiven = str | os.PathLike[str]

#: Options that may be given otherwise than the settings keep them.
_TAKEN = {
    "memory": "int | str",
    "layer_map": "str | Mapping[int, int] | None",
    "components": "int | str | None",
    "roles": "str | Iterable[str] | None",
}


@extras_named("align")
def train(
    store: StoreGiven,
    type: str = "procrustes",  # noqa: A002
    *,
    layers: Layers | None = None,
    source: str | None = None,
    target: str | None = None,
    both: bool = False,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    quiet: bool = False,
    **options: Any,
) -> Run:
    """Fit a map between two models' hidden states from a store alone, and score it beside its controls.

    >>> import align
    >>> run = align.train("wt103.zarr", type="reduced-rank", layers="50%", rank=2, quiet=True)
    >>> sorted(run.metrics.pairs) == sorted(run.maps)
    True

    Args:
        store: The store: its path, or an open one.
        type: Type of map, such as ``procrustes``, ``affine``, ``lora`` or ``mlp``; `align train --help` lists them.
        layers: Source layers: ``[8, 16]``, ``8``, ``"8,16"`` or ``"25%,50%"``; None for all.
        source: Source model; None for the store's first.
        target: Target model, which may be the source; None for the store's second.
        both: Also the other direction.
        out: Run directory; None for ``runs/<type>-<source>-<target>[-n]``.
        resume: Resume the interrupted run in ``out`` to the same bits; it goes by that run's own ``run.yaml``, so no
            other option than ``device`` may be given.
        quiet: Show no progress.
        **options: Every other field of :class:`align.settings.Settings` and :class:`align.settings.LoopSettings`, such
            as ``rank=16``, ``epochs=5``, ``lr=1e-3``, ``seed=1``, ``device="cuda"``, ``layer_map={16: 20}``,
            ``memory="4GiB"``.

    Returns:
        The run. Of several processes only the first writes it.

    Raises:
        TypeError: An option that does not exist; the message names the nearest.
        SpecError: A value of the wrong type or out of range, options that do not go together, or ``out`` is taken.
        FeatstoreError: Anything wrong with the store, the models, the layers or the fit.
    """
    from align.runs.train import train as run_training

    given = {"type": type, "layers": layers, "source": source, "target": target, "both": both}
    directory = None if out is None else as_path("out", out)
    if resume:
        settings = _interrupted(store, directory, {**_changed(given), **options})
    else:
        settings = make_settings(_location(store), {**given, **options})
    return Run(run_training(settings, directory, resume=resume, quiet=quiet)["run"])


@extras_named("align")
def load(run: RunGiven) -> Maps:
    """Load the maps of a run.

    >>> import align, numpy as np
    >>> run = align.train("wt103.zarr", layers="50%", quiet=True)
    >>> [fitted] = align.load(run).values()
    >>> states = np.ones((3, fitted.widths[0]), dtype=np.float32)
    >>> fitted.transform(states).shape == (3, fitted.widths[1])
    True

    Args:
        run: Run directory, or a :class:`Run`.

    Returns:
        By key, such as ``maps["llama:16->mistral:16"]``.

    Raises:
        AdapterError: There is no finished run, or it is damaged.
    """
    from align.maps.fitted import load_adapter

    return Maps(load_adapter(as_path("run", run)))


@extras_named("align")
def compare(runs: RunGiven | Iterable[RunGiven], *, reference: RunGiven | None = None) -> Leaderboard:
    """Compare the test figures of runs with a reference named beforehand, with closed-form optima and baselines.

    What is called better is judged over the whole table: in one table of equal runs in twenty, at most, anything is.

    >>> import align
    >>> runs = [align.train("wt103.zarr", type, layers="50%", quiet=True) for type in ("procrustes", "affine")]
    >>> board = align.compare(runs)
    >>> sorted(row.type for row in board.rows)
    ['affine', 'procrustes']

    Args:
        runs: Run directories, or :class:`Run` objects.
        reference: One of them, or a baseline such as ``"token"`` or ``"closed_form"``; None for the first of them that
            has the layer pair.

    Raises:
        AdapterError: A directory holds no finished run, or a damaged one.
        SpecError: There are none, or the reference is neither one of them nor a baseline of theirs.
    """
    from align.sweeps.compare import compare_runs

    given = [runs] if isinstance(runs, str | os.PathLike) else several("runs", runs, "run directories, or runs")
    if not given:
        raise SpecError("there are no runs to compare; give their directories")
    named = None if reference is None else str(as_path("reference", reference))
    found = compare_runs([as_path("run", run) for run in given], named)
    return Leaderboard.parse(jsonable(found), "the comparison")


@extras_named("align")
def changes(first: RunGiven, second: RunGiven) -> Changes:
    """Say what changed from one run to another, layer pair by layer pair, the largest loss of R2 first.

    The difference is R2 of the second run less that of the first, over the same test documents; what is called better
    or worse is judged over all layer pairs together.

    >>> import align
    >>> runs = [align.train("wt103.zarr", type, layers="50%", quiet=True) for type in ("procrustes", "affine")]
    >>> changed = align.changes(*runs)
    >>> [change.types for change in changed.both]
    [('procrustes', 'affine')]

    Args:
        first: Run directory, or a :class:`Run`; the earlier one.
        second: The later one.

    Raises:
        AdapterError: A directory holds no finished run, or a damaged one.
        SpecError: One of the two is no path.
    """
    from align.sweeps.changes import changes as changed_between

    found = changed_between(as_path("first", first), as_path("second", second))
    return Changes.parse(jsonable(found), "the changes")


@overload
def cka(
    store: StoreGiven,
    *,
    models: tuple[str, str] | list[str] | str | None = None,
    layers: Layers | None = None,
    estimator: str = "debiased",
    correct_features: bool = False,
    kernel: str = "linear",
    policy: str = "end",
    keep_sinks: bool = False,
    roles: str | Iterable[str] | None = None,
    measures: str | Iterable[str] = "none",
    max_rows: int = 16_384,
    draws: int = 1000,
    permutations: int = 39,
    memory: int | str = "4GiB",
    workers: int | None = None,
    scheduler: str | None = None,
    tls_ca: str | os.PathLike[str] | None = None,
    tls_cert: str | os.PathLike[str] | None = None,
    tls_key: str | os.PathLike[str] | None = None,
    device: str = "auto",
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    quiet: bool = False,
) -> Similarity: ...


@overload
def cka(
    store: ArrayLike | torch.Tensor,
    other: ArrayLike | torch.Tensor,
    /,
    *,
    documents: ArrayLike | torch.Tensor | None = None,
    estimator: str = "debiased",
    correct_features: bool = False,
    kernel: str = "linear",
) -> float: ...


def cka(store: Any, other: Any = None, **options: Any) -> Similarity | float:
    """Compare layers by CKA: all layers of two models in a store, or two arrays of paired rows.

    ``cka(store)`` compares all layers with all layers over the whole store, exactly, and returns a :class:`Similarity`.
    ``cka(x, y)`` compares two arrays ``(n, d1)`` and ``(n, d2)``, numpy or torch, whose i-th rows belong together, and
    returns a float: 1 for the same up to rotation, shift and scale, 0 on average for independent rows, never clamped.
    Of arrays there are the keywords ``documents`` (labels ``(n,)``, which document each row is of: pairs within one are
    left out; without them every row is its own), ``estimator`` (``debiased`` or ``biased``), ``correct_features`` and
    ``kernel`` alone.

    >>> import align, numpy as np
    >>> align.cka("wt103.zarr", layers="0%,50%", quiet=True).estimator
    'debiased'
    >>> x = np.random.default_rng(0).normal(size=(500, 8))
    >>> round(align.cka(x, 3 * x[:, ::-1] + 1), 6)
    1.0

    Args:
        store: The store: its path, or an open one. Or the first array.
        other: The second array.
        **options: Of a store:

            - ``models``: two names, ``("llama", "mistral")`` or ``"llama,mistral"``; None for the store's first two.
            - ``layers``: layers of both models: ``[8, 16]``, ``"8,16"`` or ``"25%,50%"``; None for all.
            - ``estimator``: ``debiased`` (over pairs of rows of different documents), ``debiased-rows`` (of different
              rows), ``biased`` or ``minibatch``; ``kernel``: ``linear`` over all rows, or ``rbf`` over a sample of
              ``max_rows`` (16384).
            - ``correct_features``: take the dimensions for a sample of a larger population of features
              (arXiv 2502.15104); of ``debiased``.
            - ``policy``: pair policy, ``end``, ``word`` or ``byte``; ``keep_sinks``: sinks in the main figures.
            - ``roles``: only rows of these roles, ``"assistant"`` or ``["user", "assistant"]``; None for all.
            - ``measures``: others, over the sample: names such as ``["rsa"]``, or ``"all"``; ``draws``: resamples of
              documents behind each interval (1000).
            - ``permutations``: exchanges of partners behind each floor (39), 0 for no floors and no intervals of the
              main figure: documents in each other's place, and partners of the same token elsewhere.
            - ``memory``: bytes, or such as ``"4GiB"``; ``device``: of RBF kernels; ``seed``: of sample, floors and
              draws.
            - ``workers``: local processes instead of threads of this one; or ``scheduler``: address of a Dask
              scheduler, with ``tls_ca``, ``tls_cert`` and ``tls_key``, the files of a TLS connection to it.
            - ``out``: a directory for ``cka.json``, ``cka.html`` and the pictures, in which an interrupted scan is
              resumed; without it nothing is written. ``quiet``: show no progress.

    Returns:
        :class:`Similarity` of a store; a float of arrays, NaN with a warning where CKA is undefined.

    Raises:
        TypeError: A keyword that does not exist or is of a store only, or arguments that are neither.
        SpecError: An option that does not parse.
        FitError: Arrays of unequal lengths, fewer than four rows, or not finite.
        FeatstoreError: Anything wrong with the store, the models or the layers.
    """
    if isinstance(store, str | os.PathLike | Store):
        if other is not None:
            raise TypeError("align.cka() takes one store, or two arrays; name models and layers of a store by keyword")
        check_keywords(_cka_of_store, "align.cka", options)
        with extras_named("align"):
            return _cka_of_store(store, **options)
    if other is None:
        raise TypeError("align.cka() takes the path of a store, an open one, or two arrays of paired rows")
    with extras_named("align"):
        return _cka_of_arrays(store, other, **options)


def _cka_of_store(
    store: StoreGiven,
    *,
    models: tuple[str, str] | list[str] | str | None = None,
    layers: Layers | None = None,
    estimator: str = "debiased",
    correct_features: bool = False,
    kernel: str = "linear",
    policy: str = "end",
    keep_sinks: bool = False,
    roles: str | Iterable[str] | None = None,
    measures: str | Iterable[str] = "none",
    max_rows: int = 16_384,
    draws: int = 1000,
    permutations: int = 39,
    memory: int | str = "4GiB",
    workers: int | None = None,
    scheduler: str | None = None,
    tls_ca: str | os.PathLike[str] | None = None,
    tls_cert: str | os.PathLike[str] | None = None,
    tls_key: str | os.PathLike[str] | None = None,
    device: str = "auto",
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    quiet: bool = False,
) -> Similarity:
    from align.execution.choice import executor
    from align.execution.options import Execution
    from align.layers import choose_models
    from align.resources import choose_device
    from align.results import SimilarityDocuments
    from align.similarity.compare import Comparison
    from align.similarity.measures.by_name import parse_measures
    from featstore.models.references import parse_layers

    directory = None if out is None else as_path("out", out)
    if directory is not None:
        check_directory(directory)
        check_folder(directory, "checkpoints", make=False)
    chosen_measures = parse_measures(_measures_text(measures))
    # A value of another type would otherwise show after a scan of minutes.
    max_rows, draws = typed("max_rows", max_rows, "int"), typed("draws", draws, "int")
    permutations = whole("permutations", permutations, 0)
    seed, keep_sinks = whole("seed", seed, 0), typed("keep_sinks", keep_sinks, "bool")
    files = {"tls_ca": tls_ca, "tls_cert": tls_cert, "tls_key": tls_key}
    execution = Execution(
        workers=typed("workers", workers, "int | None"),
        scheduler=typed("scheduler", scheduler, "str | None"),
        **{name: None if path is None else as_path(name, path) for name, path in files.items()},
    )
    opened = store if isinstance(store, Store) else open_store(_location(store))
    names = _model_names(models)
    chosen = choose_models(opened, *names) if names else choose_models(opened, None, None)
    held = {name: opened.model(name).layers for name in dict.fromkeys(chosen)}
    text = layers_text(layers)
    if text is not None:
        wanted = parse_layers([text], {name: opened.model(name).depth for name in held})
        held = {name: tuple(opened.layer(name, k) for k in ks) for name, ks in wanted.items()}
    comparison = Comparison(
        Path(_location(store)),
        models=chosen,
        layers=held,
        estimator=estimator,
        correct_features=typed("correct_features", correct_features, "bool"),
        kernel=kernel,
        policy=policy,
        keep_sinks=keep_sinks,
        roles=roles,
        measures=chosen_measures,
        max_rows=max_rows,
        draws=draws,
        permutations=permutations,
        memory=bytes_of(memory),
        checkpoint=None if directory is None else directory / "checkpoints",
        device=choose_device(device, by_gradient=kernel == "rbf"),
        seed=seed,
        quiet=quiet,
    )
    with executor(execution, quiet=quiet) as workers_or_threads:
        found = Similarity.parse(jsonable(comparison.run(workers_or_threads)))
    if directory is not None:
        sums = comparison.by_document
        found.write(directory, None if sums is None else SimilarityDocuments.parse(jsonable(sums)))
        comparison.discard()
    return found


def _measures_text(measures: str | Iterable[str]) -> str:
    """Measures as the command reads them; none of them is ``none``."""
    if isinstance(measures, str):
        return measures
    names = several("measures", measures, "names such as ['rsa'], or 'all' or 'none'")
    return ",".join(typed("measures", name, "str") for name in names) or "none"


def _model_names(models: tuple[str, str] | list[str] | str | None) -> list[str]:
    """The two models that were named; none where the store's first two are meant."""
    if models is None:
        return []
    wanted = "two names, such as llama,mistral"
    names = models.split(",") if isinstance(models, str) else several("models", models, wanted)
    if len(names) != 2 or not all(isinstance(name, str) for name in names):
        raise SpecError(f"--models {models!r}: write {wanted}")
    return [name.strip() for name in names]


def _cka_of_arrays(
    x: Any,
    y: Any,
    *,
    documents: Any = None,
    estimator: str = "debiased",
    correct_features: bool = False,
    kernel: str = "linear",
    **others: Any,
) -> float:
    if others:
        raise TypeError(
            "align.cka() of two arrays has the keywords documents, estimator, correct_features and kernel, not "
            f"{next(iter(others))!r}; for a comparison of layers in a store give its path"
        )
    if correct_features:
        return _corrected(x, y, documents, estimator, kernel)
    from align.kernels.api import compare_layers

    found = compare_layers(
        [x, y],
        kernel=kernel,  # type: ignore[arg-type]
        estimator=estimator,  # type: ignore[arg-type]
        wanted=[(0, 1)],
        documents=documents,
    )
    for place, reason in found.reasons.items():
        which = ("first", "second")[place]
        warnings.warn(f"CKA is undefined: {reason} (the {which} array)", RuntimeWarning, stacklevel=3)
    return float(found.cka()[0, 1])


def _location(store: StoreGiven) -> str:
    if isinstance(store, Store):
        return str(store.path)
    as_path("store", store)
    # As it is written: a path would take one of two slashes out of a URL.
    return os.fspath(store)


def _changed(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments that differ from their defaults."""
    defaults = inspect.signature(train).parameters
    return {name: value for name, value in given.items() if value != defaults[name].default}


def _interrupted(store: StoreGiven, out: Path | None, options: dict[str, Any]) -> Settings:
    """The settings of an interrupted run."""
    from align.resources import choose_device
    from align.runs.rundir import check_free
    from align.settings import load_settings

    if out is None:
        raise SpecError("--resume needs --out: the directory of the interrupted run")
    check_free(out, resume=True)
    if others := options.keys() - {"device"}:
        raise SpecError(
            f"--resume: {out / 'run.yaml'} decides the whole run; leave out {min(others)} or change it in a copy of "
            "that file"
        )
    settings = replace(load_settings(out / "run.yaml"), store=_location(store))
    device = choose_device(options.get("device", settings.loop.device), by_gradient=settings.by_gradient)
    return replace(settings, loop=replace(settings.loop, device=device))


def _complete_signature() -> inspect.Signature:
    """The signature of :func:`train` with every option, for `help` and completion."""
    own = inspect.signature(train)
    shown = {name: each for name, each in own.parameters.items() if name != "options"}
    for name, (entry, option) in OPTIONS.items():
        if name not in shown:
            # What a command shows as the default: text, or nothing where the default depends on the type of map.
            default = None if option.by_type else entry.default if option.typed is None else option.typed
            kind = f"{entry.type} | None" if option.by_type else _TAKEN.get(name, entry.type)
            shown[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
    return own.replace(parameters=list(shown.values()))


train.__signature__ = _complete_signature()  # type: ignore[attr-defined]


def _corrected(x: Any, y: Any, documents: Any, estimator: str, kernel: str) -> float:
    """CKA of the populations that the features of two arrays are samples of."""
    from align.metrics import debiased_cka

    if (estimator, kernel) != ("debiased", "linear"):
        raise SpecError("correct_features is of the estimator 'debiased' with the linear kernel; leave the others out")
    arrays = [given.detach().cpu().double().numpy() if hasattr(given, "detach") else given for given in (x, y)]
    labels = documents.cpu().numpy() if hasattr(documents, "cpu") else documents
    value, reason = debiased_cka(arrays[0], arrays[1], labels, correct_features=True)
    if reason:
        warnings.warn(f"CKA is undefined: {reason}", RuntimeWarning, stacklevel=4)
    return value
