"""Tests of chatreid_plugin.engine.screening.selection: what a build trains on after quality and the audit."""

import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from chatreid_plugin.config import BuildSettings
from chatreid_plugin.engine.runner import build_datasets
from chatreid_plugin.engine.screening.selection import screen_part
from chatreid_plugin.engine.sources import find_manifest, parse_sources, read_training_images
from chatreid_plugin.engine.validation import split_people
from chatreid_plugin.errors import DataError
from chatreid_plugin.records import INSTRUCTION_SCHEMA
from chatreid_plugin.shards import read_shard


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


def list_shown(recipe: BuildSettings) -> dict[int, set[str]]:
    """Build a recipe and return the images of each stage's records."""
    shown: dict[int, set[str]] = {}
    for name in build_datasets(recipe).datasets:
        for shard in (recipe.output_dir / name).iterdir():
            images = chain.from_iterable(read_shard(shard, INSTRUCTION_SCHEMA)["images"].to_pylist())
            shown.setdefault(int(name.removeprefix("chatreid_stage")[0]), set()).update(i["path"] for i in images)
    return shown


@pytest.mark.parametrize(
    ("changes", "screened"), [({}, {1}), ({"quality": {"stages": [1, 3]}}, {1, 3}), ({"quality": None}, set())]
)
def test_poor_images_are_left_out_of_stage_1_by_default_as_in_the_paper(
    make_recipe: MakeRecipe,
    world: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    screened: set[int],
) -> None:
    dark = sorted((world / "bounding_box_train").iterdir())[0]
    Image.new("RGB", (64, 128), (3, 3, 3)).save(dark)
    # As many records as show every image.
    records = {"stage1": 600, "stage2": 300, "stage3": 300}
    shown = list_shown(make_recipe(records=records, records_per_shard=1000, **changes))
    path = f"bounding_box_train/{dark.name}"
    assert {stage for stage, paths in shown.items() if path not in paths} == screened
    # The captions of the world are a person's, so that the image has some.
    assert {stage: len(paths) for stage, paths in shown.items()} == {s: 48 - (s in screened) for s in (1, 2, 3)}
    stages = " and ".join(map(str, sorted(screened)))
    assert (f"world left out of Stage {stages}: 1 (quality.min_" in capsys.readouterr().err) == bool(screened)


def test_people_are_held_out_before_poor_images_are_left_out(make_recipe: MakeRecipe) -> None:
    # Otherwise a person whose images all go would shift who is held out, from one stage to the other.
    settings = make_recipe(validation_share=0.3, quality={"min_brightness": 100.0, "near_duplicate_bits": None})
    parts = split_people(read_training_images(settings, write=False).tables, settings)
    pieces = [piece for part in parts for piece in screen_part(part)]
    kinds = [(False, (1,)), (False, (2, 3)), (True, (1,)), (True, (2, 3))]
    assert [(piece.held_out, piece.stages) for piece in pieces] == kinds
    people = [set(piece.images[0]["person_id"].to_pylist()) for piece in pieces]
    assert people[0] <= people[1] and people[2] <= people[3] and not people[1] & people[3]


def test_source_whose_images_all_go_is_named(make_recipe: MakeRecipe) -> None:
    with pytest.raises(DataError, match="Source world: `quality` drops all 48 training images"):
        build_datasets(make_recipe(quality={"min_width": 2000}))
    # Stages 2 and 3 do without.
    build_datasets(make_recipe(quality={"min_width": 2000}, records={"stage2": 20}))
