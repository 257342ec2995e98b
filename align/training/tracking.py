"""A run's figures in an external tracker as well: through accelerate's own, so that one interface serves all of them.

``tensorboard`` writes event files and reaches for no network. ``wandb`` is used where it is installed, offline unless
its user says otherwise (``WANDB_MODE``).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align.scoring.rows import Epoch
from align.training.plan import TRACKERS, Placement
from featstore.errors import MissingPackageError, SpecError
from featstore.runtime.extras import install_words
from featstore.runtime.writing import check_folder, make_folder, remove_folder

Log = Callable[[Mapping[str, float], int], None]


class Tracker:
    """Sends figures on, under the name of their layer pair.

    Args:
        log: Takes figures by name, and where on the x axis they belong.
    """

    def __init__(self, log: Log) -> None:
        self._log = log

    def epoch(self, pair: str, epoch: Epoch) -> None:
        """An epoch's figures: losses and their components, R2, CKA, learning rate, gradient norm.

        Args:
            pair: Key of the layer pair.
            epoch: What it measured; its number is the place on the x axis.
        """
        figures: dict[str, Any] = {
            "loss/train": epoch.train_loss,
            "loss/train_recent": epoch.recent_loss,
            "loss/val": epoch.val_loss,
            **{f"train/{name}": value for name, value in epoch.parts.items()},
            **{f"val/{name}": value for name, value in epoch.val_parts.items()},
            "val/r2": epoch.val.get("r2"),
            "val/cka": epoch.val.get("cka_debiased"),
            "lr": epoch.lr,
            "grad_norm": epoch.grad_norm,
            "seconds": epoch.seconds,
        }
        self._send(f"{_tag(pair)}/epoch", figures, epoch.epoch)

    def step(self, pair: str, event: Mapping[str, Any]) -> None:
        """A step event's figures: loss, CKA, learning rate.

        Args:
            pair: Key of the layer pair.
            event: As :func:`align.training.loop.train_map` tells it; its step is the place on the x axis.
        """
        self._send(f"{_tag(pair)}/step", {name: event[name] for name in ("loss", "cka", "lr")}, int(event["step"]))

    def _send(self, prefix: str, figures: Mapping[str, Any], at: int) -> None:
        known = {f"{prefix}/{name}": float(value) for name, value in figures.items() if value is not None}
        self._log(known, at)


def check_tracker(kind: str) -> None:
    """Refuse a tracker that cannot be used, before anything is read.

    Args:
        kind: One of :data:`align.training.plan.TRACKERS`.

    Raises:
        SpecError: Unknown.
        MissingPackageError: It is not installed.
    """
    if kind not in TRACKERS:
        raise SpecError(f"--tracker {kind!r}: choose one of {', '.join(TRACKERS)}")
    packages = {"tensorboard": ("tensorboardX", "tensorboard"), "wandb": ("wandb",), "none": ()}[kind]
    if packages and not any(importlib.util.find_spec(name) for name in packages):
        raise MissingPackageError(
            f"--tracker {kind} needs the package {packages[0]}, which is not installed: "
            f"{install_words(packages[0])}, or use --tracker none"
        )


@contextmanager
def tracking(kind: str, place: Placement, run: Path, config: Mapping[str, Any]) -> Iterator[Tracker]:
    """A tracker for one run, closed at the end. Of several processes, only the first one's sends anything.

    Event files that an interrupted run left in ``<run>/tensorboard`` are removed: a resumed training tells everything
    again.

    Args:
        kind: One of :data:`align.training.plan.TRACKERS`.
        place: Device and precision, since accelerate's state is made here if training has not begun.
        run: Run directory; its name is the run's.
        config: Settings, JSON values; wandb keeps them with the run.

    Raises:
        SpecError: Unknown tracker, or the device is not there.
        MissingPackageError: The tracker is not installed.
    """
    check_tracker(kind)
    tracker: Any = None
    if kind != "none":
        from align.training.engine import accelerator_for

        # accelerate's trackers log, and its logging wants to know which process this is.
        accelerator = accelerator_for(place)
        if accelerator.is_main_process:
            tracker = _tensorboard(run) if kind == "tensorboard" else _wandb(run, config)
    if tracker is None:
        yield Tracker(lambda _figures, _at: None)
        return

    def log(figures: Mapping[str, float], at: int) -> None:
        if kind == "tensorboard":
            tracker.log(dict(figures), step=at)
        else:
            # wandb has one axis for everything and drops what lies behind; so the place goes along as a figure.
            tracker.log({**figures, "at": at})

    try:
        yield Tracker(log)
    finally:
        tracker.finish()


def _tensorboard(run: Path) -> Any:
    from accelerate.tracking import TensorBoardTracker

    remove_folder(run, "tensorboard")
    tracker = TensorBoardTracker("tensorboard", logging_dir=run)
    tracker.start()
    return tracker


def _wandb(run: Path, config: Mapping[str, Any]) -> Any:
    from accelerate.tracking import WandBTracker

    # Nobody's figures leave the machine because a package happens to be installed.
    os.environ.setdefault("WANDB_MODE", "offline")
    check_folder(run, "wandb", make=False)
    make_folder(run)
    tracker = WandBTracker("featstore", name=run.name, dir=str(run))
    tracker.start()
    tracker.store_init_configuration(dict(config))
    return tracker


def _tag(pair: str) -> str:
    """A layer pair's key without what tensorboard would replace: ``a:1->b:1`` is ``a.1-b.1``."""
    return pair.replace("->", "-").replace(":", ".")
