"""Tests of chatreid_plugin.engine.look_alikes: builds whose hard negatives are found by features in files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatreid_plugin.config import BuildSettings
from chatreid_plugin.engine import executors
from chatreid_plugin.engine.build import build_datasets
from chatreid_plugin.errors import DataError
from chatreid_plugin.records import INSTRUCTION_SCHEMA
from chatreid_plugin.shards import read_shard


MakeRecipe = Callable[..., BuildSettings]
PAIRS = "chatreid_stage2_image_to_image_one_to_one"
# Six of the eight people look like each other: ten images of five others in each camera.
LARGE_GROUP = range(1, 7)


def list_shards(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.parquet")}


def get_person(path: str) -> int:
    return int(Path(path).name.partition("_")[0])


@pytest.fixture
def write_features(world: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes the features of the world's training images, in any order, without the first."""

    def write(name: str = "looks.npz", left_out: int = 0, seed: int = 0) -> Path:
        rng = np.random.default_rng(seed)
        paths = sorted(path.relative_to(world).as_posix() for path in (world / "bounding_box_train").iterdir())
        paths = list(rng.permutation(paths[left_out:]))
        sides = np.array([[1, 0] if get_person(path) in LARGE_GROUP else [0, 1] for path in paths])
        features = np.hstack([5.0 * sides, rng.standard_normal((len(paths), 6))])
        np.savez(tmp_path / name, paths=np.array(paths), features=features.astype(np.float32))
        return tmp_path / name

    return write


@pytest.fixture
def make_hard(make_recipe: MakeRecipe, tmp_path: Path) -> MakeRecipe:
    """Return a function that makes a recipe all of whose negatives are hard, of pairs alone."""

    def make(name: str = "looks.npz", **changes: Any) -> BuildSettings:
        hard = {"share": 1.0, "from": str(tmp_path / name)}
        values = {"stage2_ratios": {"image_to_image_one_to_one": 1.0}, "records": {"stage1": 8, "stage2": 100}}
        return make_recipe(**values | {"gallery": {"hard_negatives": hard}} | changes)

    return make


def test_hard_negatives_of_each_source_are_look_alikes_by_its_file(
    make_hard: MakeRecipe, write_features: Callable[..., Path], world: Path, tmp_path: Path
) -> None:
    shutil.copytree(world, tmp_path / "deep" / "other")
    first = make_hard().sources[0].model_dump() | {"captions": None}
    sources = [first | {"name": "other", "root": tmp_path / "deep" / "other"}, first]
    write_features("other.npz", seed=1)
    write_features("world.npz")
    recipe = make_hard("{source}.npz", sources=sources, records={"stage2": 300}, records_per_shard=100)
    build_datasets(recipe)
    kinds: dict[str, list[tuple[bool, ...]]] = {"world": [], "other": []}
    for shard in sorted((recipe.output_dir / PAIRS).iterdir()):
        for row in read_shard(shard, INSTRUCTION_SCHEMA).to_pylist():
            if not row["answer"]["match"]:
                people = [get_person(image["path"]) in LARGE_GROUP for image in row["images"]]
                kinds[row["dataset"]].append(tuple(people))
    # Who is in the large group gets look-alikes of it; of the small group's ten look-alikes eight are of the large.
    # So 20 % are mixed; drawn from everybody it would be 43 %.
    for found in kinds.values():
        mixed = sum(len(set(people)) == 2 for people in found)
        assert len(found) > 10 and mixed / len(found) < 0.35 and (True, True) in found


def test_features_are_noted_and_others_are_not_mixed_in(
    make_hard: MakeRecipe, write_features: Callable[..., Path]
) -> None:
    write_features()
    recipe = make_hard()
    whole = list_shards(build_datasets(recipe).output_dir)
    assert build_datasets(recipe).written == 0
    provenance = json.loads((recipe.output_dir / f"{PAIRS}.json").read_text())
    assert provenance["settings"]["gallery"]["hard_negatives"]["from"].endswith("looks.npz")
    # A killed build goes on to the same bytes.
    (recipe.output_dir / PAIRS / "00003.parquet").unlink()
    build_datasets(recipe)
    assert list_shards(recipe.output_dir) == whole
    write_features(seed=1)
    with pytest.raises(DataError, match="was built from other settings or images"):
        build_datasets(recipe)
    # Stage 1 shows nobody else: its records, which may have trained the model that gave the features, stay.
    assert build_datasets(recipe, overwrite=True).reused == ["chatreid_stage1_image_captioning"]
    changed = list_shards(recipe.output_dir)
    assert changed.keys() == whole.keys() and changed != whole
    assert build_datasets(make_hard(gallery={}), overwrite=True).reused == ["chatreid_stage1_image_captioning"]


def test_bytes_do_not_depend_on_who_writes_them(
    make_hard: MakeRecipe, write_features: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_features()
    alone = list_shards(build_datasets(make_hard()).output_dir)
    monkeypatch.setattr(executors, "SMALLEST_PARALLEL", 0)
    together = make_hard(workers=2, output_dir=tmp_path / "together")
    assert list_shards(build_datasets(together).output_dir) == alone
    assert not list(together.output_dir.glob(".training_images*"))


def test_missing_features_are_named_before_anything_is_written(
    make_hard: MakeRecipe, write_features: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = make_hard()
    with pytest.raises(DataError, match=r"looks\.npz does not exist\. Write it with `chatreid embed"):
        build_datasets(recipe, dry_run=True)
    write_features(left_out=2)
    for dry_run in (True, False):
        with pytest.raises(DataError) as caught:
            build_datasets(recipe, dry_run=dry_run)
        message = str(caught.value)
        assert "looks.npz lacks the features of 2 of 48 training images of world" in message
        assert "\n  bounding_box_train/0001_" in message
    assert not list(recipe.output_dir.glob("*.json"))
    # Stage 1 alone has no negatives, and neither has a share of 0.
    build_datasets(make_hard(records={"stage1": 8}))
    hard = {"share": 0, "from": str(tmp_path / "none.npz")}
    build_datasets(make_hard(gallery={"hard_negatives": hard}, output_dir=tmp_path / "easy"))
