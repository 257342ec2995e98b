"""Which models and which layers are paired, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from align.layers import LayerPair, choose_models, in_order, joint_pairs, layer_pairs, source_layers
from featstore.errors import LayerRangeError, SpecError, StoreStateError
from featstore.store import Store
from tests.support.planted import plant


def store_with(path: Path, a: tuple[int, ...], b: tuple[int, ...], depths: tuple[int, int]) -> Store:
    rows = np.random.default_rng(0).normal(size=(60, 4))
    return plant(path / "s.zarr", dict.fromkeys(a, rows), dict.fromkeys(b, rows), documents=10, depths=depths).store


@pytest.fixture(scope="module")
def equal(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return store_with(tmp_path_factory.mktemp("equal"), (0, 2, 4, 8), (0, 4, 6, 8), (8, 8))


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return store_with(tmp_path_factory.mktemp("unequal"), (0, 4, 8), (0, 6, 12), (8, 12))


def keys(store: Store, source: str = "a", target: str = "b", **options: str) -> list[str]:
    return [pair.key for pair in layer_pairs(store, source, target, **options)]


def test_equal_depths_pair_equal_layers_that_both_hold(equal: Store) -> None:
    assert keys(equal) == ["a:0->b:0", "a:4->b:4", "a:8->b:8"]
    assert keys(equal, "b", "a") == ["b:0->a:0", "b:4->a:4", "b:8->a:8"]


def test_different_depths_pair_the_same_place(unequal: Store) -> None:
    assert keys(unequal) == ["a:0->b:0", "a:4->b:6", "a:8->b:12"]
    assert keys(unequal, "b", "a") == ["b:0->a:0", "b:6->a:4", "b:12->a:8"]


def test_a_model_pairs_with_itself(equal: Store) -> None:
    assert keys(equal, "a", "a") == ["a:0->a:0", "a:2->a:2", "a:4->a:4", "a:8->a:8"]


def test_layers_chooses_source_layers(equal: Store, unequal: Store) -> None:
    assert keys(equal, layers="8,4") == ["a:4->b:4", "a:8->b:8"]
    assert keys(equal, layers="50%") == ["a:4->b:4"]
    assert keys(unequal, layers="4") == ["a:4->b:6"]
    assert keys(unequal, "b", "a", layers="50%") == ["b:6->a:4"]


def test_a_map_pairs_anything_in_the_order_typed(equal: Store) -> None:
    assert keys(equal, layer_map="8:0, 2:6") == ["a:8->b:0", "a:2->b:6"]
    assert keys(equal, layer_map="4:4,4:4,4:6") == ["a:4->b:4", "a:4->b:6"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": "3"}, "layer 3 of 'a' is not in .* holds 0, 2, 4, 8"),
        ({"layers": "9"}, "layer 9 is outside 0..8"),
        ({"layers": "2"}, "layer 2 of a has no partner in b; use --layer-map"),
        ({"layer_map": "3:4"}, "layer 3 of 'a' is not in"),
        ({"layer_map": "4:2"}, "layer 2 of 'b' is not in .* holds 0, 4, 6, 8"),
    ],
)
def test_a_layer_the_store_lacks_is_named(equal: Store, options: dict[str, str], words: str) -> None:
    with pytest.raises(LayerRangeError, match=words):
        layer_pairs(equal, "a", "b", **options)


@pytest.mark.parametrize("text", ["", "4", "4:", ":4", "a:b", "4:4:4", "-4:4", "4:4,", "4.0:4", "4:" + "9" * 5000])
def test_a_map_that_does_not_parse_is_quoted(equal: Store, text: str) -> None:
    with pytest.raises(SpecError, match="write SOURCE:TARGET layer numbers, such as 16:20,24:24"):
        layer_pairs(equal, "a", "b", layer_map=text)


def test_layers_and_map_together_are_refused(equal: Store) -> None:
    with pytest.raises(SpecError, match="give one of them"):
        layer_pairs(equal, "a", "b", layers="4", layer_map="4:4")


def test_lists_of_unequal_length_need_a_map(tmp_path: Path) -> None:
    store = store_with(tmp_path, (0, 4), (0, 6, 12), (8, 12))
    with pytest.raises(SpecError, match=r"a has layers \(0, 4\) and b \(0, 6, 12\).*use --layer-map"):
        layer_pairs(store, "a", "b")
    assert keys(store, layer_map="4:6") == ["a:4->b:6"]


def test_no_layer_in_common_needs_a_map(tmp_path: Path) -> None:
    store = store_with(tmp_path, (0, 4), (2, 6), (8, 8))
    with pytest.raises(SpecError, match="a and b share no layers"):
        layer_pairs(store, "a", "b")


@pytest.mark.parametrize(
    ("source", "target", "chosen"),
    [
        (None, None, ("a", "b")),
        ("b", None, ("b", "a")),
        (None, "a", ("b", "a")),
        (None, "b", ("a", "b")),
        ("b", "b", ("b", "b")),
    ],
)
def test_source_and_target_default_to_the_stores_order(
    equal: Store, source: str | None, target: str | None, chosen: tuple[str, str]
) -> None:
    assert choose_models(equal, source, target) == chosen


@pytest.mark.parametrize(("source", "target"), [("c", None), (None, "c")])
def test_an_unknown_model_is_named_with_those_there_are(equal: Store, source: str | None, target: str | None) -> None:
    with pytest.raises(StoreStateError, match=r"no model 'c' in .*; it holds a, b"):
        choose_models(equal, source, target)


def test_a_pair_knows_its_key_and_its_reverse() -> None:
    pair = LayerPair("llama", (16,), "mistral", 20)
    assert pair.key == "llama:16->mistral:20"
    assert pair.reversed.key == "mistral:20->llama:16"
    assert pair.reversed.reversed == pair


def test_a_joint_pair_takes_every_source_layer_to_each_target_layer(equal: Store) -> None:
    singles = layer_pairs(equal, "a", "b", layers="0,4,8")
    forward = joint_pairs(singles)
    assert [pair.key for pair in forward] == ["a:0+4+8->b:0", "a:0+4+8->b:4", "a:0+4+8->b:8"]
    assert forward[1].source_layers == (0, 4, 8)
    assert forward[1].source_layer == 8
    backward = joint_pairs(layer_pairs(equal, "a", "b", layer_map="0:4,4:4,8:6"), backwards=True)
    assert [pair.key for pair in backward] == ["b:4+6->a:0", "b:4+6->a:4", "b:4+6->a:8"]


def test_one_source_layer_is_not_joint(equal: Store) -> None:
    with pytest.raises(SpecError, match=r"--joint needs at least two source layers, not \(4,\)"):
        joint_pairs(layer_pairs(equal, "a", "b", layers="4"))


def test_source_layers_are_those_named_or_all(equal: Store) -> None:
    assert source_layers(equal, "a", None) == (0, 2, 4, 8)
    assert source_layers(equal, "a", "8,50%") == (8, 4) or source_layers(equal, "a", "8,50%") == (4, 8)
    with pytest.raises(LayerRangeError, match="layer 3 of 'a'"):
        source_layers(equal, "a", "3")


def test_keys_sort_by_the_numbers_of_layers() -> None:
    wanted = [
        "a:1->b:2", "a:1->b:10", "a:2->b:1", "a:2+3->b:1", "a:2+10->b:1", "a:10->b:1", "a:b:3->c:1", "a:b:20->c:1",
        "odd", "x->y:1->z:2", "x->y:1->z:10",
    ]  # fmt: skip
    assert sorted(sorted(wanted), key=in_order) == wanted
    assert sorted(wanted) != wanted
