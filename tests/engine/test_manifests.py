"""Tests of chatreid_plugin.engine.manifests: manifests are made, used again, and made anew when they are stale."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatreid_plugin.config import BuildSettings, SourceSettings
from chatreid_plugin.datasets.registry import list_source
from chatreid_plugin.engine import image_facts, manifests
from chatreid_plugin.engine.image_facts import inspect_image
from chatreid_plugin.engine.manifests import (
    find_manifest,
    is_current,
    parse_source,
    parse_sources,
    read_training_images,
)
from chatreid_plugin.errors import ConfigError, DataError
from chatreid_plugin.shards import read_manifest, write_manifest


MakeRecipe = Callable[..., BuildSettings]
MakeImage = Callable[..., Path]


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the sources that are parsed from now on, in order."""
    names: list[str] = []
    parse = manifests.parse_source
    monkeypatch.setattr(
        manifests, "parse_source", lambda source, *rest: (names.append(source.name), parse(source, *rest))[1]
    )
    return names


def change_source(settings: BuildSettings, **changes: Any) -> BuildSettings:
    source = settings.sources[0].model_copy(update=changes)
    return settings.model_copy(update={"sources": (source,)})


def list_files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_parse_writes_a_manifest_and_says_what_was_found(
    make_recipe: MakeRecipe, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = make_recipe()
    assert parse_sources(settings) == [find_manifest(settings, "world")]
    records, root = read_manifest(find_manifest(settings, "world"))
    assert root == world
    assert len(records) == 48 + 17 + 6
    output = capsys.readouterr()
    assert output.out == ""
    assert "world train: 48 images, 8 identities, 3 cameras" in output.err
    assert "world query: 6 images, 3 identities, 3 cameras" in output.err
    assert "world gallery: 17 images, 4 identities, 3 cameras" in output.err
    assert "world left out: 4 (junk (identity -1))" in output.err
    assert "world warning: " in output.err and "Market-1501 has 3368" in output.err


def test_manifest_names_the_version_folder_as_root(make_recipe: MakeRecipe, world: Path, tmp_path: Path) -> None:
    (tmp_path / "outer").mkdir()
    inner = world.rename(tmp_path / "outer" / "Market-1501-v15.09.15")
    settings = change_source(make_recipe(), root=tmp_path / "outer", captions=None)
    parse_sources(settings)
    records, root = read_manifest(find_manifest(settings, "world"))
    assert root == inner
    assert all((root / record.path).is_file() for record in records)


def test_run_killed_between_a_manifest_and_its_provenance_trains_on_no_other_split(
    make_recipe: MakeRecipe, world: Path, parsed: list[str]
) -> None:
    """The first recipe's provenance would vouch for the second one's images, of which the first tests some."""
    first = make_recipe()
    path = find_manifest(first, "world")
    parse_sources(first)
    before = path.with_name(f"{path.name}.json").read_bytes()
    second = change_source(first, parser="pattern", pattern="{rest}/{person}_c{camera}s{index}.jpg", captions=None)
    parse_sources(second)
    path.with_name(f"{path.name}.json").write_bytes(before)
    parsed.clear()
    assert not is_current(path, first.sources[0])
    (table,), _, _ = read_training_images(first, write=True)
    assert parsed == ["world"]
    assert {name.partition("/")[0] for name in table["path"].to_pylist()} == {"bounding_box_train"}


def test_recheck_looks_at_no_earlier_manifest(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier: list[Path | None] = []
    parse = manifests.parse_source

    def parse_and_note(source: Any, workers: int, manifest: Path | None) -> Any:
        earlier.append(manifest)
        return parse(source, workers, manifest)

    monkeypatch.setattr(manifests, "parse_source", parse_and_note)
    path = find_manifest(make_recipe(), "world")
    parse_sources(make_recipe())
    parse_sources(make_recipe(), recheck=True)
    assert earlier == [path, None]


def test_manifest_is_used_again(make_recipe: MakeRecipe, parsed: list[str]) -> None:
    (first,), root, _ = read_training_images(make_recipe(), write=True)
    (second,), same_root, _ = read_training_images(make_recipe(), write=True)
    assert second.equals(first)
    assert same_root == root
    assert parsed == ["world"]


def test_training_records_are_those_of_the_training_split(make_recipe: MakeRecipe, world: Path) -> None:
    (images,), root, _ = read_training_images(make_recipe(), write=False)
    assert root == world
    assert set(images["split"].to_pylist()) == {"train"}
    assert set(images["path"].to_pylist()) == {
        f"bounding_box_train/{path.name}" for path in (world / "bounding_box_train").iterdir()
    }


def test_manifest_of_other_settings_is_made_anew(make_recipe: MakeRecipe, tmp_path: Path, world: Path) -> None:
    settings = make_recipe()
    read_training_images(settings, write=True)
    shutil.copytree(world, tmp_path / "other")
    next((tmp_path / "other" / "bounding_box_train").iterdir()).unlink()
    (images,), root, _ = read_training_images(
        change_source(settings, root=tmp_path / "other", captions=None), write=True
    )
    assert root == tmp_path / "other"
    assert images.num_rows == 47
    assert not any(images["captions"].to_pylist())
    assert not is_current(find_manifest(settings, "world"), settings.sources[0])


def test_other_train_share_is_noticed(make_recipe: MakeRecipe, tmp_path: Path, make_image: MakeImage) -> None:
    for person in range(4):
        make_image(tmp_path / "crops" / f"{person}_a.jpg")
    recipe = {"name": "own", "parser": "pattern", "root": tmp_path / "crops", "pattern": "{person}_{camera}.jpg"}
    for share, expected in ((0.5, 2), (1.0, 4), (0.5, 2)):
        settings = make_recipe(sources=[recipe | {"train_share": share}])
        assert read_training_images(settings, write=True)[0][0].num_rows == expected


def test_changed_captions_are_noticed(make_recipe: MakeRecipe, world: Path, parsed: list[str]) -> None:
    read_training_images(make_recipe(), write=True)
    lines = [json.loads(line) for line in (world / "captions.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(line | {"captions": ["someone"]}) + "\n" for line in lines)
    (world / "captions.jsonl").write_text(text)
    (images,), _, _ = read_training_images(make_recipe(), write=True)
    assert set(map(tuple, images["captions"].to_pylist())) == {("someone",)}
    assert parsed == ["world", "world"]


def test_manifest_without_provenance_is_made_anew(make_recipe: MakeRecipe, parsed: list[str]) -> None:
    settings = make_recipe()
    parse_sources(settings)
    path = find_manifest(settings, "world")
    path.with_name("world.parquet.json").unlink()
    read_training_images(settings, write=True)
    assert parsed == ["world", "world"]
    assert is_current(path, settings.sources[0])


def test_nothing_is_written_unless_asked(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    before = list_files(tmp_path)
    settings = make_recipe()
    (unwritten,), _, _ = read_training_images(settings, write=False)
    assert list_files(tmp_path) == before
    assert not settings.manifest_dir.exists()
    (written,), _, _ = read_training_images(settings, write=True)
    assert written.equals(unwritten)


def test_two_sources_share_the_folder_above_both(
    make_recipe: MakeRecipe, tmp_path: Path, world: Path, make_image: MakeImage
) -> None:
    for person in range(4):
        make_image(tmp_path / "deep" / "crops" / f"{person}_a.jpg")
    own = {
        "name": "own",
        "parser": "pattern",
        "root": tmp_path / "deep" / "crops",
        "pattern": "{person}_{camera}.jpg",
        "train_share": 1,
    }
    first = make_recipe().sources[0].model_dump()
    (market, crops), root, _ = read_training_images(make_recipe(sources=[first, own]), write=True)
    assert root == tmp_path
    market_paths, crop_paths = market["path"].to_pylist(), crops["path"].to_pylist()
    assert set(crop_paths) == {f"deep/crops/{person}_a.jpg" for person in range(4)}
    assert all(path.startswith("world/bounding_box_train/") for path in market_paths)
    assert all((root / path).is_file() for path in [*market_paths, *crop_paths])


def test_source_without_training_images_is_named(
    make_recipe: MakeRecipe, tmp_path: Path, make_image: MakeImage
) -> None:
    make_image(tmp_path / "crops" / "1_a.jpg")
    own = {"name": "own", "parser": "pattern", "root": tmp_path / "crops", "pattern": "{person}_{camera}.jpg"}
    with pytest.raises(DataError, match=r"Source own has no training images\. Raise its train_share"):
        read_training_images(make_recipe(sources=[own | {"train_share": 0}]), write=False)


def test_tested_sources_are_parsed_but_give_no_training_images(make_recipe: MakeRecipe, parsed: list[str]) -> None:
    source = make_recipe().sources[0].model_dump()
    recipe = make_recipe(sources=[source, source | {"name": "tested", "stages": []}])
    (images,), _, _ = read_training_images(recipe, write=True)
    assert set(images["dataset"].to_pylist()) == {"world"}
    # The audit reads its manifest.
    assert parsed == ["world", "tested"]
    assert find_manifest(recipe, "tested").is_file()


def test_recipe_without_a_source_to_train_is_refused(make_recipe: MakeRecipe) -> None:
    source = make_recipe().sources[0].model_dump() | {"stages": []}
    with pytest.raises(DataError, match="No source trains a stage"):
        read_training_images(make_recipe(sources=[source]), write=False)


MakeSource = Callable[..., SourceSettings]


@pytest.fixture
def damaged(world: Path) -> tuple[str, str]:
    """Cut the world's first query and empty its last; return their paths below the world."""
    first, *_, last = sorted((world / "query").iterdir())
    content = first.read_bytes()
    first.write_bytes(content[: len(content) // 2])
    last.write_bytes(b"")
    return first.relative_to(world).as_posix(), last.relative_to(world).as_posix()


def test_records_hold_what_the_pixels_say(make_source: MakeSource, world: Path) -> None:
    records = parse_source(make_source()).records
    assert len(records) == 71
    for record in records[::10]:
        facts = inspect_image(world / record.path)
        assert (record.content_hash, record.perceptual_hash) == (facts.content_hash, facts.perceptual_hash)
        assert (record.sharpness, record.brightness) == (facts.sharpness, facts.brightness)


def test_unreadable_images_are_refused(make_source: MakeSource, damaged: tuple[str, str]) -> None:
    with pytest.raises(DataError) as caught:
        parse_source(make_source())
    message = str(caught.value)
    assert message.startswith("Source market1501: 2 image(s) cannot be read. First: ")
    assert damaged[0] in message and "unreadable: skip" in message


def test_unreadable_images_are_left_out_when_asked(make_source: MakeSource, damaged: tuple[str, str]) -> None:
    report = parse_source(make_source(unreadable="skip"))
    assert report.skipped["cannot be decoded"] == 2
    assert len(report.records) == 71 - 2
    assert not {record.path for record in report.records} & set(damaged)
    for path in damaged:
        assert any(path in warning for warning in report.warnings)


def test_number_of_workers_does_not_matter(
    make_source: MakeSource, damaged: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_facts, "SMALLEST_PARALLEL", 2)
    source = make_source(unreadable="skip")
    alone = parse_source(source, workers=1)
    shared = parse_source(source, workers=2)
    assert shared == alone
    assert len(alone.records) == 69


def test_listing_opens_no_image(make_source: MakeSource, world: Path, damaged: tuple[str, str]) -> None:
    assert len(list_source(make_source()).crops) == 71


def test_name_of_the_source_is_the_default_parser(make_source: MakeSource, world: Path) -> None:
    assert len(list_source(make_source(parser=None)).crops) == 71
    with pytest.raises(ConfigError, match=r"Source mine: unknown parser 'mine'\. Known: .*market1501, .*pattern"):
        list_source(make_source(name="mine", parser=None))


def test_unknown_variant_is_refused(make_source: MakeSource, world: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown variant 'v2'\. market1501 has none"):
        list_source(make_source(variant="v2"))


@pytest.mark.parametrize(
    "changes",
    [{"name": "dukemtmc", "parser": None}, {"parser": "OccludedDuke"}, {"root": Path("/data/P-DukeMTMC-reID")}],
)
def test_duke_is_refused_by_name_with_the_reason(make_source: MakeSource, changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"looks like DukeMTMC.*withdrew it in 2019.*Use another data set"):
        list_source(make_source(**changes))


@pytest.mark.parametrize("age", [-1, 100], ids=["newer date", "older date"])
def test_unchanged_images_of_an_earlier_manifest_are_not_decoded_again(
    make_source: MakeSource, tmp_path: Path, world: Path, monkeypatch: pytest.MonkeyPatch, age: int
) -> None:
    """A copy that brings an older date along is another file all the same."""
    manifest = tmp_path / "manifests" / "market1501.parquet"
    first = parse_source(make_source())
    old = min(path.stat().st_mtime for path in world.rglob("*.jpg")) - 100
    for path in world.rglob("*.jpg"):
        os.utime(path, (old, old))
    write_manifest(manifest, first.records, first.root, {})
    changed = sorted((world / "query").iterdir())[0]
    changed.write_bytes((world / "bounding_box_train" / first.records[-30].path.split("/")[1]).read_bytes())
    os.utime(changed, (manifest.stat().st_mtime - age,) * 2)
    decoded: list[str] = []
    inspect = image_facts.inspect_image

    def inspect_and_note(path: Path) -> image_facts.ImageFacts:
        decoded.append(path.name)
        return inspect(path)

    monkeypatch.setattr(image_facts, "inspect_image", inspect_and_note)
    again = parse_source(make_source(), manifest=manifest)
    assert decoded == [changed.name]
    before = {record.path: record for record in first.records}
    assert [r.path for r in again.records if r != before[r.path]] == [f"query/{changed.name}"]
    assert parse_source(make_source(), manifest=tmp_path / "none.parquet").records == again.records
