"""Tests of chatreid_plugin.engine.screening.selection: what a build trains on after quality and the audit."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from chatreid_plugin.config import BuildSettings
from chatreid_plugin.engine.runner import build_datasets
from chatreid_plugin.engine.sources import find_manifest, parse_sources, read_training_images
from chatreid_plugin.errors import DataError


MakeRecipe = Callable[..., BuildSettings]
PLANTED = "bounding_box_train/0001_c1s1_999999_00.jpg"


@pytest.fixture
def leaking(world: Path) -> str:
    """Copy a query into the training folder, under the name of a training identity; return the query's path."""
    query = sorted((world / "query").iterdir())[0]
    shutil.copy(query, world / PLANTED)
    return f"query/{query.name}"


def list_paths(recipe: BuildSettings) -> set[str]:
    return {path for table in read_training_images(recipe, write=False)[0] for path in table["path"].to_pylist()}


def plain(recipe: BuildSettings, **changes: object) -> list[dict[str, object]]:
    """Return the recipe's source without captions, which do not name the planted image."""
    return [recipe.sources[0].model_dump() | {"captions": None} | changes]


def test_build_refuses_a_set_that_leaks_and_names_the_pair(make_recipe: MakeRecipe, leaking: str) -> None:
    recipe = make_recipe(sources=plain(make_recipe()))
    with pytest.raises(DataError) as caught:
        build_datasets(recipe)
    message = str(caught.value)
    assert f"world/{PLANTED}" in message and f"world/{leaking}" in message
    assert "leaks: drop" in message and "leaks: allow" in message
    assert not (recipe.output_dir / "dataset_info.json").exists()


def test_leaking_images_and_their_person_are_dropped_when_told(make_recipe: MakeRecipe, leaking: str) -> None:
    recipe = make_recipe(sources=plain(make_recipe()), leaks="drop")
    paths = list_paths(recipe)
    # Person 1 shares an image with a tested person, so none of their six images is trained on.
    assert len(paths) == 48 - 6
    assert not any("/0001_" in path for path in paths)


def test_leaks_are_trained_on_when_allowed(
    make_recipe: MakeRecipe, leaking: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(sources=plain(make_recipe()), leaks="allow")
    assert PLANTED in list_paths(recipe)
    assert "warning: 7 training images leak into the test" in capsys.readouterr().err


def test_benchmark_that_is_only_tested_counts(make_recipe: MakeRecipe, world: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(world / "bounding_box_test", own / "a")
    crops = {"name": "own", "parser": "pattern", "root": own, "pattern": "a/{person}_c{camera}s1_{index}.jpg"}
    recipe = make_recipe(sources=[crops | {"train_share": 1.0}, *plain(make_recipe(), stages=[])])
    with pytest.raises(DataError, match="own/a/.*world/bounding_box_test"):
        build_datasets(recipe)
    # The same benchmark as a manifest of another recipe.
    benchmark = make_recipe(sources=plain(make_recipe()), manifest_dir=tmp_path / "elsewhere")
    parse_sources(benchmark)
    against = make_recipe(sources=[crops | {"train_share": 1.0}], audit_against=[find_manifest(benchmark, "world")])
    with pytest.raises(DataError, match="own/a/.*world/bounding_box_test"):
        build_datasets(against)


def test_poor_images_are_left_out_and_counted(
    make_recipe: MakeRecipe, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dark = sorted((world / "bounding_box_train").iterdir())[0]
    Image.new("RGB", (64, 128), (3, 3, 3)).save(dark)
    recipe = make_recipe(sources=plain(make_recipe()), quality={"min_sharpness": None})
    paths = list_paths(recipe)
    assert len(paths) == 47 and f"bounding_box_train/{dark.name}" not in paths
    assert "world left out: 1 (quality.min_brightness)" in capsys.readouterr().err
    with pytest.raises(DataError, match="Source world: `quality` drops all 48 training images"):
        list_paths(make_recipe(sources=plain(make_recipe()), quality={"min_width": 2000}))
