"""The programme: which commands are run, in which order, and what each has to leave behind.

Nothing runs here. A step is a command line as a person would type it; whether it is done is decided by the files it
makes and by its being the same command (:mod:`evaluate.reproduce.running`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from evaluate.reproduce.places import Places

#: Of LoRA and of the run whose every epoch is put into the model.
RANK = 32


@dataclass(frozen=True)
class Scale:
    """How much of everything.

    Attributes:
        stitch_tokens: Target tokens of every stitched loss.
        examples: Questions of every task.
        tasks: As ``evaluate communicate --task`` takes them.
        epochs: Of every training.
        ranks: Of low-rank corrections.
        latents: Latents and their width, of compressed runs.
        roles: Roles of the rows that are fitted, compared and scored; None for all.
    """

    stitch_tokens: str = "1200"
    examples: int = 40
    tasks: tuple[str, ...] = ("countries",)
    epochs: int = 10
    ranks: tuple[int, ...] = (8, 32, 128)
    latents: tuple[tuple[int, int], ...] = ((8, 32), (32, 64))
    roles: str | None = None


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: Of the step; for fits also of the run directory.
        tool: ``featstore``, ``align`` or ``evaluate``.
        arguments: What follows it.
        makes: Files, below the programme's directory.
        needs: Steps that have to be done before.
        fits: Whether it makes a run directory, whose last file in ``makes`` is written when all else is.
    """

    name: str
    tool: str
    arguments: tuple[str, ...]
    makes: tuple[str, ...]
    needs: tuple[str, ...] = ()
    fits: bool = False


class _Programme:
    """Collects steps; every path is below one directory."""

    def __init__(self, store: Path, out: Path, places: Places, scale: Scale) -> None:
        self.store, self.out, self.places, self.scale = store, out, places, scale
        self.steps: list[Step] = []
        self.middle = ("--layers", places.text([places.middle]))
        self.inner = ("--layers", places.text(places.inner))
        self.roles = () if scale.roles is None else ("--roles", scale.roles)

    def fit(self, name: str, type_: str, *arguments: str, trains: bool = False) -> None:
        """A run of `align train`."""
        if trains:
            arguments = (*arguments, "--epochs", str(self.scale.epochs))
        command = ("train", "--store", str(self.store), "--type", type_, *arguments, *self.roles)
        command = (*command, "--out", self._run(name))
        makes = (f"runs/{name}/metrics.json", f"runs/{name}/adapter.json")
        self.steps.append(Step(name, "align", command, makes, fits=True))

    def stitch(self, run: str, *arguments: str, into: str = "") -> None:
        """The stitched loss of a run."""
        out = ("--out", f"{self._run(run)}/{into}") if into else ()
        command = ("stitch", "--store", str(self.store), "--adapter", self._run(run), *arguments)
        command = (*command, "--max-tokens", self.scale.stitch_tokens, *out)
        where = f"runs/{run}/{into}" if into else f"runs/{run}"
        made = (f"{where}/stitch_documents.json", f"{where}/stitch.json")
        self._add(f"stitch {run}{' ' if into else ''}{into}", "evaluate", command, made, (run,))

    def communicate(self, run: str, *arguments: str) -> None:
        """The tasks, with a run's states."""
        tasks = tuple(part for task in self.scale.tasks for part in ("--task", task))
        command = ("communicate", "--adapter", self._run(run), *tasks, "--examples", str(self.scale.examples))
        made = (f"runs/{run}/communicate.json",)
        self._add(f"communicate {run}", "evaluate", (*command, *arguments), made, (run,))

    def generate(self, run: str, *arguments: str) -> None:
        """Texts."""
        command = ("generate", "--adapter", self._run(run), *arguments)
        self._add(f"generate {run}", "evaluate", command, (f"runs/{run}/generations.json",), (run,))

    def cka(self) -> None:
        """All layers with all layers."""
        command = ("cka", "--store", str(self.store), *self.roles, "--out", self._run("cka"))
        self._add("cka", "align", command, ("runs/cka/cka.json",))

    def _run(self, name: str) -> str:
        return str(self.out / "runs" / name)

    def _add(
        self,
        name: str,
        tool: str,
        arguments: tuple[str, ...],
        makes: tuple[str, ...],
        needs: tuple[str, ...] = (),
    ) -> None:
        self.steps.append(Step(name, tool, arguments, makes, needs))


def programme(store: Path, out: Path, places: Places, scale: Scale, widths: tuple[int, int]) -> list[Step]:
    """All steps over a store that is there.

    Args:
        store: The store.
        out: Where everything goes.
        places: Its layer pairs.
        scale: How much of everything.
        widths: Of the two streams; ranks of half the smaller or more are left out.

    Returns:
        Cheap and telling steps first, so that an interrupted programme has answered something.
    """
    plan = _Programme(store, out, places, scale)
    plan.cka()
    for type_ in ("procrustes", "linear", "affine"):
        plan.fit(type_, type_, "--both")
    if several := len(places.inner) > 1:
        plan.fit("joint", "affine", "--joint", "--both", *plan.inner)
    for rank in (rank for rank in scale.ranks if 2 * rank < min(widths)):
        for name, skip in (("", "none"), ("-on-procrustes", "procrustes")):
            options = ("--rank", str(rank), "--skip", skip, "--both", *plan.inner)
            plan.fit(f"rank-{rank}{name}", "reduced-rank", *options)
    for model in (places.source, places.target):
        # A model with itself: what is lost where nothing is lost between two models.
        itself = ("--source", model, "--target", model, *plan.middle)
        plan.fit(f"self-{model}", "procrustes", *itself)
    # Never stops early, so that the whole curve is there and early stopping can be judged from it.
    whole = ("--patience", str(scale.epochs))
    plan.fit("lora", "lora", "--both", "--rank", str(RANK), *whole, trains=True)
    plan.fit("affine-adamw", "affine", "--solver", "adamw", "--both", *plan.inner, *whole, trains=True)
    for latents, width in scale.latents:
        shape = ("--latents", str(latents), "--latent-dim", str(width))
        plan.fit(compressed(latents, width), "compress", *shape, *plan.middle, trains=True)
    plan.stitch("affine", "--source-alone")
    for run in ("procrustes", "linear", "lora", f"self-{places.source}", f"self-{places.target}"):
        plan.stitch(run, *plan.middle)
    if several:
        plan.stitch("joint")
    plan.stitch("affine", *plan.middle, "--keep", "hide", into="hidden")
    for latents, width in scale.latents:
        plan.stitch(compressed(latents, width))
    plan.communicate("affine", *plan.middle, "--itself")
    for latents, width in scale.latents:
        plan.communicate(compressed(latents, width))
    plan.generate("affine", *plan.middle)
    plan.fit("lora-epochs", "lora", "--rank", str(RANK), "--eval-models", *plan.middle, *whole, trains=True)
    return plan.steps


def compressed(latents: int, width: int) -> str:
    """Name of a compressed run.

    Args:
        latents: How many.
        width: Of each.
    """
    return f"compress-{latents}x{width}"
