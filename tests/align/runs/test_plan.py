"""How a run's maps come about, resolved from its settings."""

from __future__ import annotations

import ast
from dataclasses import asdict, replace

import pytest

from align.closed_form.fit import Fit
from align.maps.registry import map_type
from align.runs.plan import Sharing, map_plan, training_plan, windows_plan
from align.settings import LoopSettings, Settings
from tests.support import ROOT

LOOP = LoopSettings(rank=3, skip="ridge", hidden=5, latents=7, latent_dim=2, seed=4)


@pytest.mark.parametrize(
    ("settings", "fit", "optimum"),
    [
        (Settings("s", "procrustes"), Fit("procrustes", scale=True), ""),
        (Settings("s", "procrustes", scale=False), Fit("procrustes", scale=False), ""),
        (Settings("s", "procrustes", components="9"), Fit("procrustes", components=9), ""),
        (Settings("s", "procrustes", components="auto"), Fit("procrustes", components="auto"), ""),
        (Settings("s", "affine"), Fit("affine"), "affine ridge"),
        (Settings("s", "linear", solver="adamw"), Fit("linear"), "linear ridge"),
        (Settings("s", "reduced-rank"), Fit("reduced-rank", rank=3, skip="ridge"), "reduced-rank 3 on ridge"),
        (Settings("s", "lora"), Fit("reduced-rank", rank=3, skip="ridge"), "reduced-rank 3 on ridge"),
        (
            Settings("s", "lora", shared=True),
            Fit("reduced-rank", rank=3, skip="ridge"),
            "reduced-rank 3 on a shared ridge",
        ),
        (Settings("s", "mlp"), Fit("affine"), "affine ridge"),
        (Settings("s", "compress"), Fit("affine"), "affine ridge"),
    ],
)
def test_what_is_solved_for(settings: Settings, fit: Fit, optimum: str) -> None:
    plan = map_plan(replace(settings, loop=LOOP))
    assert plan.fit == fit
    assert plan.optimum == optimum


@pytest.mark.parametrize(
    ("settings", "ways"),
    [
        (Settings("s", "procrustes"), (False, False)),
        (Settings("s", "affine", solver="closed"), (False, False)),
        (Settings("s", "affine", solver="adamw"), (True, False)),
        (Settings("s", "lora"), (True, False)),
        (Settings("s", "compress"), (False, True)),
    ],
)
def test_a_map_comes_about_in_one_way(settings: Settings, ways: tuple[bool, bool]) -> None:
    plan = map_plan(settings)
    assert (plan.training is not None, plan.windows is not None) == ways


def test_layers_share_a_whole_map_or_a_base() -> None:
    shared = {
        type_: map_plan(Settings("s", type_, shared=True, loop=LOOP)).sharing
        for type_ in ("procrustes", "affine", "lora")
    }
    assert shared == {
        "procrustes": Sharing(whole=True, base="procrustes", scale=True, rank=3),
        "affine": Sharing(whole=False, base="ridge", scale=True, rank=3),
        "lora": Sharing(whole=False, base="ridge", scale=True, rank=3),
    }
    assert map_plan(Settings("s", "lora")).sharing is None


@pytest.mark.parametrize(
    ("type_", "solver", "partners"),
    [
        ("procrustes", None, "procrustes"),
        ("linear", None, "linear"),
        ("affine", "adamw", "affine"),
        ("linear", "adamw", "affine"),
        ("reduced-rank", None, "affine"),
        ("lora", None, "affine"),
        ("compress", None, "affine"),
    ],
)
def test_partners_are_chosen_by_a_closed_form_of_full_rank(type_: str, solver: str | None, partners: str) -> None:
    assert map_plan(Settings("s", type_, solver=solver)).partners == Fit(partners)


def test_only_a_whole_rotation_leaves_cka_alone() -> None:
    assert map_plan(Settings("s", "procrustes")).isometric
    assert not map_plan(Settings("s", "procrustes", components="4")).isometric
    assert not map_plan(Settings("s", "affine")).isometric


@pytest.mark.parametrize("type_", ["lora", "mlp", "reduced-rank", "procrustes"])
def test_a_rotation_without_a_factor_is_known_as_one(type_: str) -> None:
    settings = Settings("s", type_, scale=False, loop=replace(LOOP, skip="procrustes"))
    assert map_plan(settings).bare
    assert map_plan(replace(settings, shared=type_ in ("lora", "procrustes"))).bare
    assert not map_plan(replace(settings, scale=True)).bare
    with_ridge = map_plan(replace(settings, loop=replace(LOOP, skip="ridge")))
    assert with_ridge.bare == (type_ == "procrustes")
    if type_ in ("lora", "reduced-rank"):
        assert map_plan(settings).optimum == "reduced-rank 3 on procrustes without scale"
        assert not map_plan(settings).fit.scale
        assert map_plan(replace(settings, scale=True)).fit.scale


def test_types_without_a_rotation_know_no_scale() -> None:
    for type_ in ("affine", "linear", "compress"):
        with_scale, without = (map_plan(Settings("s", type_, scale=scale, loop=LOOP)) for scale in (True, False))
        assert not without.bare
        assert with_scale.fit == without.fit


def test_a_training_on_a_bare_rotation_is_another_one() -> None:
    for type_ in (map_type("lora"), map_type("mlp")):
        loop = replace(LOOP, skip="procrustes")
        plans = [training_plan(type_, loop, scale=scale) for scale in (True, False)]
        assert [plan.identity["scale"] for plan in plans] == [True, False]
        # What carried on before there was a factor names none, and what has no rotation is the same as ever.
        assert "scale" not in training_plan(type_, LOOP).identity
    assert "scale" not in training_plan(map_type("affine"), replace(LOOP, skip="procrustes")).identity


def test_an_interrupted_training_is_recognised_by_what_matters() -> None:
    lora = map_type("lora")
    plan = training_plan(lora, LOOP)
    assert plan.identity["batch_size"] == 128
    assert plan.identity == training_plan(lora, replace(LOOP, device="cuda", tracker="none", cka_every=1)).identity
    matters = {"rank": 4, "alpha": 2.0, "skip": "none", "loss": "cosine=1", "temperature": 1.0, "epochs": 3, "seed": 5}
    matters |= {"patience": 7, "min_delta": 0.1, "batch_size": 9, "clip": 2.0, "lr": 0.5, "precondition": False}
    for name, value in matters.items():
        assert plan.identity != training_plan(lora, replace(LOOP, **{name: value})).identity, name  # type: ignore[arg-type]
    windows = windows_plan(map_type("compress"), LOOP)
    assert windows.identity != windows_plan(map_type("compress"), replace(LOOP, latents=8)).identity
    assert windows.identity == windows_plan(map_type("compress"), replace(LOOP, rank=8)).identity


def test_every_setting_of_a_training_reaches_its_plan() -> None:
    loop = LoopSettings(
        rank=3,
        alpha=2.0,
        skip="none",
        hidden=5,
        loss="cosine=2",
        temperature=0.5,
        epochs=7,
        patience=6,
        min_delta=0.1,
        batch_size=9,
        accumulate=8,
        clip=0.3,
        lr=0.4,
        precision="float32",
        cka_every=11,
        checkpoint_every=12,
        precondition=False,
        seed=13,
        device="cuda:1",
    )
    plan = training_plan(map_type("lora"), loop, scale=False)
    told = {**asdict(plan.shape), **asdict(plan.schedule), **asdict(plan.place), "temperature": plan.goal.temperature}
    given = {
        name: value for name, value in asdict(loop).items() if name not in ("loss", "tracker", "latents", "latent_dim")
    }
    assert told == {**given, "type": "lora", "scale": False}
    assert plan.goal.weights == {"mse": 0.0, "cosine": 2.0, "infonce": 0.0}


#: Modules of the room above the resolved run: they make settings, resolve them, or write them down.
ABOVE = {
    *("cli", "api", "notebook/keywords", "notebook/run"),
    *("runs/train", "runs/together", "runs/plan", "runs/job", "runs/rundir"),
    *("sweeps/grid", "sweeps/sweep"),
}


def test_no_module_below_a_resolved_run_knows_settings() -> None:
    for path in (ROOT / "align").rglob("*.py"):
        name = path.relative_to(ROOT / "align").with_suffix("").as_posix()
        if name in ABOVE | {"settings"}:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            imported = [node.module] if isinstance(node, ast.ImportFrom) else []
            assert "align.settings" not in imported, name
            assert not (isinstance(node, ast.Attribute) and node.attr in ("settings", "_settings")), name


def test_no_module_asks_for_a_type_by_its_name() -> None:
    names = {"lora", "mlp", "affine", "reduced-rank"}
    for path in (ROOT / "align").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                asked = {
                    part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and type(part.value) is str
                }
                assert not asked & names, f"{path}:{node.lineno}: ask the record of the type"
