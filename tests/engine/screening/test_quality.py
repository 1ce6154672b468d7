"""Tests of chatreid_plugin.engine.screening.quality: which images go, for which reason, and which copy stays."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from chatreid_plugin.config import BuildSettings, QualitySettings, SourceSettings
from chatreid_plugin.demo.world import WorldSummary
from chatreid_plugin.engine.build import build_datasets
from chatreid_plugin.engine.manifests import find_manifest, parse_source, parse_sources, read_training_images
from chatreid_plugin.engine.screening.quality import find_drops, screen_part, split_people
from chatreid_plugin.engine.stats import compute_statistics
from chatreid_plugin.errors import DataError
from chatreid_plugin.records import INSTRUCTION_SCHEMA, ImageRecord
from chatreid_plugin.shards import make_manifest_table, read_shard


OFF = QualitySettings.model_validate(dict.fromkeys(QualitySettings.model_fields.keys() - {"stages"}))
TEXTURED = int("f0" * 32, 16)


def flip(*bits: int) -> str:
    """Return a hash that differs from TEXTURED in these bits."""
    return f"{TEXTURED ^ sum(1 << bit for bit in bits):064x}"


def make_record(number: int, person: str = "1", dataset: str = "own", **changes: Any) -> ImageRecord:
    record = ImageRecord(
        f"{dataset}/{number}.jpg", dataset, "train", f"{number}.jpg", f"{dataset}:{person}", "1", 64, 128,
        sharpness=100.0, brightness=100.0,
    )  # fmt: skip
    return replace(record, **changes)


def list_drops(records: list[ImageRecord], settings: QualitySettings) -> list[tuple[str, str, float]]:
    drops = find_drops(make_manifest_table(records), settings)
    return [(records[drop.row].path, drop.reason, drop.value) for drop in drops]


@pytest.mark.parametrize(
    ("changes", "reason", "value"),
    [
        ({"width": 15, "height": 40}, "min_width", 15),
        ({"width": 30, "height": 31}, "min_height", 31),
        ({"width": 100, "height": 90}, "min_aspect", 0.9),
        ({"width": 20, "height": 120}, "max_aspect", 6),
        ({"sharpness": 2.9}, "min_sharpness", 2.9),
        ({"brightness": 14.5}, "min_brightness", 14.5),
        ({"brightness": 241.0}, "max_brightness", 241.0),
    ],
)
def test_poor_image_goes_for_its_reason(changes: dict[str, Any], reason: str, value: float) -> None:
    good, poor = make_record(0), make_record(1, **changes)
    assert list_drops([good, poor], QualitySettings()) == [(poor.path, reason, value)]
    assert list_drops([poor], QualitySettings.model_validate({reason: None})) == []


def test_value_at_the_limit_stays() -> None:
    limits = {"width": 16, "height": 32, "sharpness": 3.0, "brightness": 15.0}
    records = [make_record(0, **limits), make_record(1, width=32, height=32), make_record(2, width=20, height=100)]
    assert list_drops(records, QualitySettings()) == []


def test_image_with_several_faults_is_counted_once_for_the_first() -> None:
    record = make_record(0, width=8, height=8, sharpness=0.0, brightness=0.0)
    assert list_drops([record], QualitySettings()) == [("0.jpg", "min_width", 8)]
    assert list_drops([record], QualitySettings(min_width=None, min_height=None)) == [("0.jpg", "min_sharpness", 0)]


def test_what_was_not_measured_passes() -> None:
    records = [make_record(n, width=0, height=0, sharpness=None, brightness=None) for n in range(3)]
    assert list_drops(records, QualitySettings(near_duplicate_bits=15)) == []


def test_no_check_drops_anything_when_all_are_off() -> None:
    records = [make_record(n, width=1, height=1, sharpness=0, perceptual_hash=flip()) for n in range(3)]
    assert list_drops(records, OFF) == []


def test_copy_of_an_earlier_image_of_the_identity_goes() -> None:
    records = [
        make_record(0, perceptual_hash=flip()),
        make_record(1, perceptual_hash=flip(3, 200)),
        make_record(2, perceptual_hash=flip(1, 2, 3, 4, 5, 6, 7, 8, 9)),
        make_record(3, "2", perceptual_hash=flip()),
        make_record(4, perceptual_hash=flip()),
        make_record(5, "1", "other", perceptual_hash=flip()),
        make_record(6, perceptual_hash=flip(3, 200)),
    ]
    assert list_drops(records, QualitySettings()) == [
        ("1.jpg", "near_duplicate_bits", 2),
        ("4.jpg", "near_duplicate_bits", 0),
        ("6.jpg", "near_duplicate_bits", 2),
    ]


@pytest.mark.parametrize(("bits", "gone"), [(0, ["2.jpg"]), (1, ["2.jpg"]), (2, ["1.jpg", "2.jpg"]), (None, [])])
def test_number_of_bits_says_what_a_copy_is(bits: int | None, gone: list[str]) -> None:
    records = [make_record(n, perceptual_hash=flip(*places)) for n, places in enumerate([(), (1, 2), ()])]
    drops = list_drops(records, QualitySettings(near_duplicate_bits=bits))
    assert [path for path, _, _ in drops] == gone


def test_copy_of_a_copy_stays_when_it_is_far_from_the_image_kept() -> None:
    records = [make_record(n, perceptual_hash=flip(*range(6 * n))) for n in range(4)]
    drops = list_drops(records, QualitySettings(near_duplicate_bits=8))
    assert drops == [("1.jpg", "near_duplicate_bits", 6), ("3.jpg", "near_duplicate_bits", 6)]


def test_copy_of_an_image_dropped_for_another_reason_stays() -> None:
    blurred = make_record(0, sharpness=2.0, perceptual_hash=flip())
    sharp = make_record(1, perceptual_hash=flip())
    assert list_drops([blurred, sharp], QualitySettings()) == [("0.jpg", "min_sharpness", 2.0)]


def test_copies_go_across_identities_when_every_identity_has_one_image() -> None:
    single = [make_record(n, str(n), "luperson", perceptual_hash=flip(n)) for n in range(3)]
    several = [make_record(3, "a", perceptual_hash=flip()), make_record(4, "b", perceptual_hash=flip())]
    several.append(make_record(5, "b", perceptual_hash=flip(*range(40))))
    drops = list_drops([*single, *several], QualitySettings())
    assert drops == [("1.jpg", "near_duplicate_bits", 2), ("2.jpg", "near_duplicate_bits", 2)]


def test_flat_pictures_are_no_copies_of_each_other() -> None:
    records = [make_record(n, perceptual_hash="8" + "0" * 63, sharpness=0.0) for n in range(3)]
    assert list_drops(records, QualitySettings(min_sharpness=None)) == []


def test_limits_the_wrong_way_round_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"quality.min_aspect 3.0 is above quality.max_aspect 2.0"):
        QualitySettings(min_aspect=3.0, max_aspect=2.0)


def test_defaults_keep_the_whole_synthetic_world(shared_world: WorldSummary) -> None:
    source = SourceSettings(name="market1501", root=Path(shared_world.root), allow_count_mismatch=True)
    records = parse_source(source).records
    assert list_drops(records, QualitySettings()) == []


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


SHARE = {"validation_share": 0.25, "records": {"stage1": 40, "stage2": 100, "stage3": 40}}


def list_people(output: Path, names: list[str]) -> set[str]:
    """Return who is on the images of some data sets: Market-1501's file names begin with the person."""
    paths = {
        image["path"]
        for name in names
        for shard in (output / name).glob("*.parquet")
        for row in read_shard(shard, INSTRUCTION_SCHEMA).to_pylist()
        for image in row["images"]
    }
    return {Path(path).name.partition("_")[0] for path in paths}


def build(recipe: BuildSettings) -> tuple[set[str], set[str]]:
    names = list(build_datasets(recipe).datasets)
    held_out = [name for name in names if name.endswith("_val")]
    return list_people(recipe.output_dir, [name for name in names if name not in held_out]), list_people(
        recipe.output_dir, held_out
    )


def test_people_held_out_train_no_record(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(**SHARE)
    report = build_datasets(recipe)
    trained = {name: count for name, count in report.datasets.items() if not name.endswith("_val")}
    assert trained == build_datasets(make_recipe(records=SHARE["records"]), dry_run=True).datasets
    assert report.datasets["chatreid_stage1_image_captioning_val"] == 10
    assert sum(count for name, count in report.datasets.items() if "stage2" in name and name not in trained) == 25
    training, held_out = build(recipe)
    assert (len(training), len(held_out)) == (6, 2) and not training & held_out
    assert build_datasets(recipe).written == 0
    entries = json.loads((recipe.output_dir / "dataset_info.json").read_text())
    assert entries.keys() == report.datasets.keys()
    text = report.render()
    assert "examples/stage1.yaml eval_dataset=chatreid_stage1 dataset_dir=" in text
    statistics = compute_statistics(recipe.output_dir).datasets
    shares = [statistics[f"chatreid_stage2_image_to_image_one_to_one{end}"].share for end in ("", "_val")]
    assert shares == pytest.approx([0.25, 0.25], abs=0.05)


def test_people_are_drawn_from_the_seed(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    def draw(seed: int, folder: str) -> set[str]:
        return build(make_recipe(**SHARE, seed=seed, output_dir=tmp_path / folder))[1]

    first = draw(0, "a")
    assert first == draw(0, "b")
    assert any(draw(seed, f"c{seed}") != first for seed in (1, 2))


def test_too_few_people_are_refused_by_name(make_recipe: MakeRecipe) -> None:
    with pytest.raises(DataError, match="validation_share: 0.9 would hold out 7 of the 8 identities of world"):
        build_datasets(make_recipe(validation_share=0.9), dry_run=True)


def test_dry_run_says_what_would_be_held_out(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(**SHARE)
    planned = build_datasets(recipe, dry_run=True)
    assert not recipe.output_dir.exists()
    assert planned.datasets == build_datasets(recipe).datasets
