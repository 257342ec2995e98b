"""Look before anything is downloaded: versions, device, disk, the import clash, and what the models are right for."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featstore.errors import FeatstoreError
from featstore.models.references import NOTHING, Allowed, ModelSpec, parse_models
from featstore.runtime.console import human_bytes
from featstore.runtime.provenance import versions
from featstore.runtime.visible import inline
from featstore.store.write.space import free_bytes

if TYPE_CHECKING:
    from featstore.models.loading import ModelInfo


def examine(
    models: Sequence[str], store: Path, *, probe: bool = False, allowed: Allowed = NOTHING, **options: Any
) -> dict[str, Any]:
    """Run all checks.

    Args:
        models: ``NAME=REF`` values to check access to.
        store: Where the store would go.
        probe: Load those whose weights lie on this disk and run every test of the instrument on them.
        allowed: Whether the base of an adapter is read that the user has not named, and pickled weights.
        options: How they are loaded, of :func:`featstore.demo.trial.try_model`.

    Returns:
        ``ok``, ``versions``, ``checks`` (each with ``name``, ``ok``, ``finding``, ``remedy``, and of a tested model
        ``lines``), and ``verified``: by model what was tested. A model is ok where its states can be stored; a layer
        that takes no injection, or a prompt that cannot be hidden, is a finding and no failure.

    Raises:
        SpecError: A model value does not parse, or an option is unknown.
    """
    from featstore.models.adapters import with_bases
    from featstore.models.trust import remember

    checks = [_python(), _torch(), _clash(), _disk("store", store), _disk("model cache", _cache())]
    verified: dict[str, Any] = {}
    for spec in parse_models(models, allowed):
        access, info = _access(spec)
        checks.append(access)
        if info is not None:
            remember(with_bases([spec]))
        if probe and info is not None:
            tested, verdict = _tested(info, options)
            checks.append(tested)
            verified |= {} if verdict is None else {spec.name: verdict}
    ok = all(check["ok"] for check in checks)
    return {"ok": ok, "versions": versions(), "checks": checks, "verified": verified}


def _check(name: str, finding: str, *, ok: bool = True, remedy: str = "") -> dict[str, Any]:
    return {"name": name, "ok": ok, "finding": finding, "remedy": remedy if not ok else ""}


def _python() -> dict[str, Any]:
    return _check("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _torch() -> dict[str, Any]:
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        memory = f"{human_bytes(free)} of {human_bytes(total)} free"
        finding = f"torch {torch.__version__}, {torch.cuda.get_device_name()}, {memory}"
    else:
        finding = f"torch {torch.__version__}, no CUDA device: models run on {os.cpu_count()} CPU cores in float32"
    return _check("device", finding)


def _clash() -> dict[str, Any]:
    """The import name ``evaluate`` also belongs to a Hugging Face package; one overwrites the other's files."""
    try:
        version = metadata.version("evaluate")
    except metadata.PackageNotFoundError:
        version = None
    found = importlib.util.find_spec("evaluate.stitching.stitch")
    if version is None and found is not None:
        return _check("import name 'evaluate'", "ours")
    what = f"the Hugging Face package evaluate {version} is installed" if version else "our package is incomplete"
    return _check(
        "import name 'evaluate'",
        f"{what}: it shares files with this project",
        ok=False,
        remedy="use an environment of its own: pip uninstall evaluate, then install featstore again",
    )


def _disk(name: str, path: Path) -> dict[str, Any]:
    if (taken := next((p for p in (path, *path.absolute().parents) if p.exists()), path)).is_file():
        return _check(
            f"disk for {name}",
            f"{path} cannot be a directory: {taken} is a file",
            ok=False,
            remedy="choose another path",
        )
    free = free_bytes(path)
    return _check(
        f"disk for {name}",
        f"{human_bytes(free)} free at {path}",
        ok=free > 2e9,
        remedy="free some space or choose another disk",
    )


def _cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _tested(info: ModelInfo, options: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The probe on a model whose weights are at hand; and its verdict, None where there is none."""
    from featstore.demo.trial import trial
    from featstore.models.loading import weight_bytes

    name = f"tests of {info.spec.name}"
    if not weight_bytes(info.spec):
        return _check(name, "not run: the weights are not on this disk, and nothing is downloaded here"), None
    found = trial(info, **options)
    if not found["ok"]:
        return _check(name, found["error"], ok=False, remedy="see the finding"), None
    return {**_check(name, "its states can be stored"), "lines": found["lines"]}, found["verified"]


def _access(spec: ModelSpec) -> tuple[dict[str, Any], ModelInfo | None]:
    """Whether a model's configuration and tokenizer can be read, and these; its weights are not touched."""
    from featstore.models.loading import inspect_model, weight_bytes
    from featstore.models.tokenizers import start_missing
    from featstore.text.tokens import ends_in_words, prove

    name = f"model {spec.name}"
    try:
        info = inspect_model(spec)
        ends = ends_in_words(prove(info.tokenizer, spec.name))
    except FeatstoreError as error:
        return _check(name, " ".join(str(error).split()), ok=False, remedy="see the finding"), None
    weights = weight_bytes(spec)
    where = f"{human_bytes(weights)} of weights on this disk" if weights else "weights not on this disk yet"
    what = f"{info.family}, {_size(info)}, {info.vocabulary} token ids, {_begins(info)}, {ends}"
    finding = f"{spec.ref}: {what}; {where}{info.peculiarities}"
    missing = start_missing(spec.name, info.start_token, info.start_token_asked)
    check = _check(name, finding)
    return (check if missing is None else {**check, "lines": [missing]}), info


def _begins(info: ModelInfo) -> str:
    """What a text begins with, in words."""
    return "no start token" if info.start_token is None else f"start token {inline(info.start_token['text'])}"


def _size(info: ModelInfo) -> str:
    """Depth and width in words."""
    depth = "a number of blocks that its configuration does not name" if info.depth is None else f"{info.depth} blocks"
    return f"{depth} of {'unknown width' if info.width is None else f'width {info.width}'}"


def describe_checks(result: dict[str, Any]) -> str:
    """The findings as lines for people.

    Args:
        result: From :func:`examine`.
    """
    lines = []
    for check in result["checks"]:
        mark = "ok  " if check["ok"] else "bad "
        lines.append(f"{mark} {check['name']}: {inline(check['finding'])}")
        lines += [f"     {inline(line)}" for line in check.get("lines", ())]
        if check["remedy"]:
            lines.append(f"     -> {inline(check['remedy'])}")
    return "\n".join(lines)
