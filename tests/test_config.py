"""Configs are built in one place, with errors that name the field."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import ml_collections
import pytest

from pixellm_jax.config import (
    SIZES,
    CodebookConfig,
    ModelConfig,
    VisionConfig,
    from_mapping,
)
from pixellm_jax.errors import InputError
from tests.support.scripts import load_file

RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


def recipe(path: Path) -> ml_collections.ConfigDict:
    return load_file(path).get_config()


def test_released_sizes_have_recipes():
    assert {path.stem for path in RECIPES} >= {"pixellm_7b", "pixellm_13b"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_builds_a_model_config(path):
    config = from_mapping(ModelConfig, recipe(path).model)
    if path.stem.removeprefix("pixellm_") in SIZES:
        assert config == SIZES[path.stem.removeprefix("pixellm_")]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_takes_an_override_of_every_kind(path):
    config = recipe(path)
    config.model.codebook.tokens_per_scale = 1
    config.model.vision.taps = (-2, -3)
    config.model.language.eps = 1
    built = from_mapping(ModelConfig, config.model)
    assert built.codebook.tokens_per_scale == 1
    assert built.vision.taps == (-2, -3)
    assert built.language.eps == 1.0 and type(built.language.eps) is float


@pytest.mark.parametrize("config", [*SIZES.values(), ModelConfig()], ids=[*SIZES, "default"])
def test_config_survives_a_round_trip_through_a_mapping(config):
    assert from_mapping(ModelConfig, dataclasses.asdict(config)) == config


def test_released_sizes_differ_as_in_the_papers():
    small, large = SIZES["7b"].language, SIZES["13b"].language
    assert (small.width, small.layers, small.mlp) == (4096, 32, 11008)
    assert (large.width, large.layers, large.mlp) == (5120, 40, 13824)
    assert SIZES["7b"].image_tokens == 256
    assert SIZES["7b"].mask_grid == 128


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"visoin": {}},
            "config: unknown key 'visoin'; did you mean 'vision'?",
        ),
        (
            {"language": {"kvheads": 4}},
            "config.language: unknown key 'kvheads'; did you mean 'kv_heads'?",
        ),
        (
            {"codebook": {"zzz": 4}},
            "config.codebook: unknown key 'zzz'; known keys: tokens_per_scale, scales",
        ),
        ({"image_grid": "16"}, "config.image_grid: expected int, found '16'"),
        ({"image_grid": 16.0}, "config.image_grid: expected int, found 16.0"),
        ({"image_grid": True}, "config.image_grid: expected int, found True"),
        ({"image_grid": None}, "config.image_grid: expected int, found None"),
        ({"dtype": 32}, "config.dtype: expected str, found 32"),
        ({"vision": {"eps": "1e-5"}}, "config.vision.eps: expected float, found '1e-5'"),
        ({"vision": 24}, "config.vision: expected a group of keys, found 24"),
        ({"vision": {"taps": -2}}, "config.vision.taps: expected a list, found -2"),
        ({"vision": {"taps": [-2, "-11"]}}, "config.vision.taps: expected int, found '-11'"),
        ({"pixel_mean": "123"}, "config.pixel_mean: expected a list, found '123'"),
    ],
)
def test_wrong_key_or_type_is_named_with_its_path(values, line):
    with pytest.raises(InputError) as caught:
        from_mapping(ModelConfig, values)
    assert str(caught.value) == line


def test_message_starts_with_the_origin_of_the_values():
    with pytest.raises(InputError, match=r"^model/config\.json\.codebook: unknown key 'n'"):
        from_mapping(ModelConfig, {"codebook": {"n": 3}}, "model/config.json")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"vision": {"canvas": 450}}, ["vision.canvas=450", "vision.patch=14"]),
        ({"vision": {"heads": 7}}, ["vision.width=1024", "vision.heads=7"]),
        ({"vision": {"taps": [-2]}}, ["vision.taps", "codebook.scales=2", "one tap per scale"]),
        ({"codebook": {"scales": 3}}, ["vision.taps", "codebook.scales=3"]),
        ({"vision": {"taps": [-2, 25]}}, ["vision.taps=(-2, 25)", "25 hidden states"]),
        ({"vision": {"taps": [-2, -26]}}, ["vision.taps=(-2, -26)", "25 hidden states"]),
        ({"vision": {"position_resize": "best"}}, ["'best'", "released", "correct"]),
        ({"language": {"kv_heads": 5}}, ["language.heads=32", "language.kv_heads=5"]),
        ({"language": {"head": 127}}, ["language.head=127", "even"]),
        ({"codebook": {"tokens_per_scale": 0}}, ["tokens_per_scale=0", "above 0"]),
        ({"language": {"heads": 0}}, ["heads=0", "above 0"]),
        ({"pixel_std": [0, 1, 1]}, ["pixel_std", "three numbers above 0"]),
        ({"pixel_mean": [1.0, 2.0]}, ["pixel_mean", "three numbers above 0"]),
        ({"language": {"eps": float("nan")}}, ["eps=nan", "above 0"]),
        ({"vision": {"patch": -14}}, ["patch=-14", "above 0"]),
        ({"decoder": {"width": 250}}, ["decoder.width=250", "decoder.heads=8"]),
        ({"dtype": "float16"}, ["dtype='float16'", "bfloat16"]),
    ],
)
def test_contradicting_fields_are_named(values, named):
    with pytest.raises(InputError) as caught:
        from_mapping(ModelConfig, values)
    for part in named:
        assert part in str(caught.value)


@pytest.mark.parametrize("taps", [(-1, 0), (24, -25)])
def test_taps_count_from_both_ends(taps):
    config = VisionConfig(taps=taps)
    assert config.tap_layers == (24, 0)
    assert config.layers_used == 24


def test_layers_above_the_deepest_tap_are_not_used():
    assert VisionConfig(taps=(-11, -2)).layers_used == 23


def test_one_scale_and_one_token_are_allowed():
    config = ModelConfig(
        vision=VisionConfig(taps=(-2,)), codebook=CodebookConfig(tokens_per_scale=1, scales=1)
    )
    assert config.mask_grid == 128
