"""A fitted map on disk: saved, loaded, refused when damaged, never a pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from align.layers import LayerPair
from align.maps.fitted import Aligner, load_adapter, save_adapter
from featstore.errors import AdapterError

KEY = "a:1->b:2"


def aligner(pair: LayerPair | None = None, shape: tuple[int, int] = (3, 5), seed: int = 0) -> Aligner:
    rng = np.random.default_rng(seed)
    tensors = {
        "weight": rng.normal(size=shape),
        "mean_source": rng.normal(size=shape[0]),
        "mean_target": rng.normal(size=shape[1]),
        "control_mean_source": rng.normal(size=shape[0]),
        "control_mean": rng.normal(size=shape[1]),
    }
    own = {name: value.astype(np.float32) for name, value in tensors.items()}
    return Aligner(pair or LayerPair("a", (1,), "b", 2), own, {"lambda": 0.1}, 15)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_adapter(tmp_path, [aligner()], {"type": "affine"})
    return tmp_path


def edit_card(run: Path, change: Any) -> None:
    card = json.loads((run / "adapter.json").read_text())
    change(card)
    (run / "adapter.json").write_text(json.dumps(card))


def edit_tensors(run: Path, **changes: np.ndarray | None) -> None:
    tensors = load_file(run / "adapter.safetensors")
    for name, value in changes.items():
        tensors.pop(f"{KEY}.{name}", None)
        if value is not None:
            tensors[f"{KEY}.{name}"] = value
    save_file(tensors, run / "adapter.safetensors")


def refused(run: Path) -> str:
    """The message of the refusal, which must be one line that names the run."""
    with pytest.raises(AdapterError) as caught:
        load_adapter(run)
    message = str(caught.value)
    assert "\n" not in message
    assert str(run) in message
    return message


def test_rows_are_mapped_by_the_row_convention() -> None:
    own = aligner()
    x = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
    t = own.tensors
    expected = [
        [
            sum((float(row[i]) - float(t["mean_source"][i])) * float(t["weight"][i, j]) for i in range(3))
            + float(t["mean_target"][j])
            for j in range(5)
        ]
        for row in x
    ]
    y = own.apply(x)
    np.testing.assert_allclose(y, expected, rtol=1e-5)
    assert y.dtype == np.float32
    assert own.shipped == 15 + 3 + 5


def test_a_saved_map_loads_to_the_bit(saved: Path) -> None:
    loaded = load_adapter(saved)
    own, back = aligner(), loaded.aligners[KEY]
    assert list(loaded.aligners) == [KEY]
    assert loaded.card["type"] == "affine"
    assert (back.pair, back.options, back.trainable) == (own.pair, own.options, own.trainable)
    assert back.tensors.keys() == own.tensors.keys()
    for name, value in own.tensors.items():
        np.testing.assert_array_equal(back.tensors[name], value)
        assert back.tensors[name].dtype == np.float32


def test_extra_tensors_travel_along(tmp_path: Path) -> None:
    own = aligner()
    own.tensors["lora_A"] = np.ones((3, 2), np.float32)
    save_adapter(tmp_path, [own], {})
    np.testing.assert_array_equal(load_adapter(tmp_path).aligners[KEY].tensors["lora_A"], np.ones((3, 2)))


def test_several_pairs_do_not_mix(tmp_path: Path) -> None:
    # Layer 1 is a prefix of layer 10, and a model name may hold a dot.
    pairs = [LayerPair("a", (1,), "b", k) for k in (1, 10)] + [
        LayerPair("a", (1,), "b.v2", 1),
        LayerPair("b", (1,), "a", 1),
    ]
    saved = {pair.key: aligner(pair, seed=i) for i, pair in enumerate(pairs)}
    save_adapter(tmp_path, list(saved.values()), {})
    loaded = load_adapter(tmp_path).aligners
    assert list(loaded) == list(saved)
    for key, own in saved.items():
        assert loaded[key].tensors.keys() == own.tensors.keys()
        np.testing.assert_array_equal(loaded[key].tensors["weight"], own.tensors["weight"])


def test_non_contiguous_and_wider_arrays_are_stored_as_float32(tmp_path: Path) -> None:
    own = aligner(shape=(4, 4))
    own.tensors["weight"] = np.arange(16, dtype=np.float64).reshape(4, 4).T
    save_adapter(tmp_path, [own], {})
    back = load_adapter(tmp_path).aligners[KEY].tensors["weight"]
    np.testing.assert_array_equal(back, np.arange(16).reshape(4, 4).T)
    assert back.dtype == np.float32


def test_the_card_says_what_a_reader_needs(saved: Path) -> None:
    entry = json.loads((saved / "adapter.json").read_text())["pairs"][0]
    assert entry["key"] == KEY
    assert entry["source"] == {"model": "a", "layer": 1, "layers": [1], "width": 3}
    assert entry["target"] == {"model": "b", "layer": 2, "width": 5}
    assert entry["parameters"] == {"trainable": 15, "shipped": 23}


def test_nothing_is_a_pickle(saved: Path) -> None:
    files = sorted(path.name for path in saved.iterdir())
    assert files == ["adapter.json", "adapter.safetensors"]
    head = (saved / "adapter.safetensors").read_bytes()
    assert json.loads(head[8 : 8 + int.from_bytes(head[:8], "little")])[f"{KEY}.weight"]["dtype"] == "F32"


def test_a_directory_without_a_run_says_how_to_make_one(tmp_path: Path) -> None:
    assert "make one with `align train`" in refused(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "\xff"])
def test_a_card_that_is_no_json_object_is_damage(saved: Path, text: str) -> None:
    (saved / "adapter.json").write_bytes(text.encode("latin-1"))
    assert "damaged" in refused(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda card: card.pop("pairs"),
        lambda card: card.update(pairs=None),
        lambda card: card.update(pairs=[None]),
        lambda card: card.update(pairs=["x"]),
        lambda card: card["pairs"][0].pop("key"),
        lambda card: card["pairs"][0].pop("source"),
        lambda card: card["pairs"][0].update(source="a"),
        lambda card: card["pairs"][0].update(parameters=None),
        lambda card: card["pairs"][0]["target"].pop("width"),
    ],
)
def test_a_card_with_a_hole_is_damage(saved: Path, change: Any) -> None:
    edit_card(saved, change)
    assert "damaged" in refused(saved)


@pytest.mark.parametrize(("version", "shown"), [(2, "2"), (None, "null"), ("1", "'1'"), (True, "true")])
def test_a_newer_format_asks_for_an_upgrade(saved: Path, version: Any, shown: str) -> None:
    edit_card(saved, lambda card: card.update(format=version))
    assert f"has format {shown}, this version reads 1; upgrade" in refused(saved)


@pytest.mark.parametrize("name", ["weight", "mean_source", "mean_target", "control_mean_source", "control_mean"])
def test_a_missing_tensor_is_named(saved: Path, name: str) -> None:
    edit_tensors(saved, **{name: None})
    assert f"tensors {name} of {KEY} are missing" in refused(saved)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("weight", (5, 3)),
        ("weight", (3, 5, 1)),
        ("mean_source", (5,)),
        ("mean_target", (3,)),
        ("control_mean_source", (3, 1)),
        ("control_mean", ()),
    ],
)
def test_a_wrong_shape_is_named(saved: Path, name: str, shape: tuple[int, ...]) -> None:
    edit_tensors(saved, **{name: np.zeros(shape, np.float32)})
    assert f"{name} of {KEY} has shape {shape}" in refused(saved)


@pytest.mark.parametrize("keep", [0, 4, 100])
def test_truncated_tensors_are_damage(saved: Path, keep: int) -> None:
    path = saved / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "damaged" in refused(saved)


def test_missing_tensors_are_damage(saved: Path) -> None:
    (saved / "adapter.safetensors").unlink()
    assert "damaged" in refused(saved)


def test_a_failed_save_leaves_the_run_without_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The card comes last: a run without it does not count as finished.
    def fail(*_: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr("align.maps.fitted.write_json", fail)
    with pytest.raises(OSError, match="no space"):
        save_adapter(tmp_path, [aligner()], {})
    assert not (tmp_path / "adapter.json").exists()
    refused(tmp_path)


# Maps that are no single matrix.


def mlp(*, skip: bool = True) -> Aligner:
    rng = np.random.default_rng(3)
    shapes = {
        "mean_source": (3,),
        "mean_target": (5,),
        "hidden_weight": (3, 7),
        "hidden_bias": (7,),
        "output_weight": (7, 5),
        "output_bias": (5,),
        "control_mean_source": (3,),
        "control_mean": (5,),
    }
    if skip:
        shapes["skip"] = (3, 5)
    own = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return Aligner(LayerPair("a", (1,), "b", 2), own, {}, 3 * 7 + 7 + 7 * 5 + 5, "mlp")


@pytest.mark.parametrize("skip", [True, False])
def test_an_mlp_is_applied_by_its_formula(skip: bool) -> None:
    own, x = mlp(skip=skip), np.random.default_rng(4).normal(size=(6, 3)).astype(np.float32)
    t = {name: value.astype(np.float64) for name, value in own.tensors.items()}
    z = x - t["mean_source"]
    h = z @ t["hidden_weight"] + t["hidden_bias"]
    expected = (h / (1 + np.exp(-h))) @ t["output_weight"] + t["output_bias"] + t["mean_target"]
    if skip:
        expected += z @ t["skip"]
    np.testing.assert_allclose(own.apply(x), expected, rtol=1e-5, atol=1e-5)
    assert own.apply(x).dtype == np.float32
    assert own.shipped == 3 + 5 + 3 * 7 + 7 + 7 * 5 + 5 + 15 * skip


def test_an_mlp_far_from_zero_neither_overflows_nor_warns() -> None:
    own = mlp()
    own.tensors["hidden_bias"][:] = [-1e4, -200, 1e4, 200, -90, 0, 90]
    assert np.isfinite(own.apply(np.zeros((2, 3), np.float32))).all()


def test_an_mlp_and_a_joint_map_come_back(tmp_path: Path) -> None:
    joint = aligner(LayerPair("a", (0, 2, 4), "b", 3), shape=(12, 5))
    save_adapter(tmp_path, [mlp(), joint], {})
    loaded = load_adapter(tmp_path).aligners
    assert list(loaded) == [KEY, "a:0+2+4->b:3"]
    assert loaded[KEY].kind == "mlp"
    assert loaded["a:0+2+4->b:3"].pair == joint.pair
    assert loaded["a:0+2+4->b:3"].widths == (12, 5)
    x = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(loaded[KEY].apply(x), mlp().apply(x))


def test_an_mlp_with_a_tensor_missing_or_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path, [mlp()], {})
    edit_tensors(tmp_path, output_weight=np.zeros((6, 5), np.float32))
    assert "output_weight" in refused(tmp_path)
    edit_tensors(tmp_path, output_weight=None)
    assert "output_weight" in refused(tmp_path)


def test_a_map_of_an_unknown_kind_is_refused(saved: Path) -> None:
    edit_card(saved, lambda card: card["pairs"][0].update(kind="oracle"))
    assert "'oracle'" in refused(saved)


def test_a_card_of_before_joint_maps_is_read(saved: Path) -> None:
    def older(card: dict[str, Any]) -> None:
        del card["pairs"][0]["kind"], card["pairs"][0]["source"]["layers"]

    edit_card(saved, older)
    assert load_adapter(saved).aligners[KEY].pair == LayerPair("a", (1,), "b", 2)


def test_a_map_of_windows_refuses_rows() -> None:
    own = mlp()
    windows = Aligner(own.pair, own.tensors, {}, 0, "compress")
    with pytest.raises(AdapterError, match="compress map: it reads whole windows"):
        windows.apply(np.zeros((1, 3), np.float32))
    assert not windows.takes_rows
