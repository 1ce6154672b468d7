"""Tests of chatreid_plugin.engine.screening.reports: what the two commands read, say and write."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFilter

from chatreid_plugin.config import BuildSettings
from chatreid_plugin.demo.layouts import LAYOUTS
from chatreid_plugin.engine.manifests import parse_sources
from chatreid_plugin.engine.screening.reports import audit_sources, filter_sources
from chatreid_plugin.errors import ConfigError, DataError
from chatreid_plugin.shards import read_json_lines


MakeRecipe = Callable[..., BuildSettings]


def list_training(world: Path) -> list[Path]:
    return sorted((world / "bounding_box_train").iterdir())


def blur(path: Path, radius: int = 12) -> None:
    with Image.open(path) as image:
        blurred = image.filter(ImageFilter.GaussianBlur(radius))
    blurred.save(path)


def describe_source(world: Path, **changes: Any) -> dict[str, Any]:
    return {"name": "world", "parser": "market1501", "root": world, "allow_count_mismatch": True} | changes


@pytest.fixture
def spoiled(world: Path) -> Path:
    """Return the world with two blurred training images, a small one, a copy and a blurred query."""
    files = list_training(world)
    for path in (files[0], files[7], next((world / "query").iterdir())):
        blur(path)
    with Image.open(files[12]) as image:
        image.resize((12, 30)).save(files[12])
    shutil.copy(files[20], files[20].with_name(files[20].name.replace("_00.jpg", "_01.jpg")))
    return world


def test_filter_counts_and_lists_what_goes_for_each_reason(
    make_recipe: MakeRecipe, spoiled: Path, tmp_path: Path
) -> None:
    settings = make_recipe(sources=[describe_source(spoiled)], quality={})
    parse_sources(settings)
    before = (tmp_path / "manifests" / "world.parquet").read_bytes()
    report = filter_sources(settings)
    (source,) = report.sources
    assert (source.name, source.images) == ("world", 49)
    assert source.dropped == {"min_width": 1, "min_sharpness": 2, "near_duplicate_bits": 1}
    assert source.drop_file == tmp_path / "manifests" / "world.dropped.jsonl"
    files = list_training(spoiled)
    lines = [line for _, line in read_json_lines(source.drop_file)]
    assert [(line["path"], line["reason"]) for line in lines] == [
        (f"bounding_box_train/{files[0].name}", "min_sharpness"),
        (f"bounding_box_train/{files[7].name}", "min_sharpness"),
        (f"bounding_box_train/{files[12].name}", "min_width"),
        (f"bounding_box_train/{files[21].name}", "near_duplicate_bits"),
    ]
    assert [lines[2]["value"], lines[3]["value"]] == [12, 0]
    text = report.render()
    assert "world: 4 of 49 training images go (8.16%)" in text
    assert "min_sharpness" in text and "world.quality.png" in text
    assert text.endswith("What goes is left out of Stage 1 (quality.stages).")
    assert json.loads(report.to_json())["sources"][0]["dropped"] == source.dropped
    assert (tmp_path / "manifests" / "world.parquet").read_bytes() == before


def test_contact_sheet_has_a_row_for_each_reason_and_a_grey_box_for_a_damaged_image(
    make_recipe: MakeRecipe, spoiled: Path
) -> None:
    settings = make_recipe(sources=[describe_source(spoiled)], quality={})
    parse_sources(settings)
    list_training(spoiled)[12].write_bytes(b"damaged")
    (source,) = filter_sources(settings, dry_run=True).sources
    assert source.sheet is not None
    with Image.open(source.sheet) as sheet:
        assert sheet.size == (8 + 8 * 104, 8 + 3 * 236)
        # The first row is min_width, whose only image is damaged; the last is the copy.
        assert sheet.getpixel((8 + 48, 8 + 18 + 96)) == (0xB0, 0xB0, 0xB0)
        copy = sheet.crop((8, 8 + 2 * 236 + 18, 104, 8 + 2 * 236 + 210))
        assert len(set(copy.getdata())) > 100
        # Labels stand above the rows.
        assert sheet.crop((8, 8, 300, 24)).convert("L").getextrema()[0] < 128


def test_dry_run_writes_no_list_and_takes_stale_sheets_away(make_recipe: MakeRecipe, spoiled: Path) -> None:
    settings = make_recipe(sources=[describe_source(spoiled)], quality={})
    parse_sources(settings)
    (source,) = filter_sources(settings, dry_run=True).sources
    assert source.drop_file is None
    assert not (settings.manifest_dir / "world.dropped.jsonl").exists()
    assert (settings.manifest_dir / "world.quality.png").is_file()
    lenient = {"min_width": None, "min_height": None, "min_sharpness": None, "near_duplicate_bits": None}
    (source,) = filter_sources(make_recipe(sources=[describe_source(spoiled)], quality=lenient)).sources
    assert (source.dropped, source.sheet) == ({}, None)
    assert not (settings.manifest_dir / "world.quality.png").exists()
    assert (settings.manifest_dir / "world.dropped.jsonl").read_text() == ""


def test_images_that_cannot_be_decoded_are_counted(make_recipe: MakeRecipe, world: Path) -> None:
    list_training(world)[3].write_bytes(b"damaged")
    settings = make_recipe(sources=[describe_source(world, unreadable="skip")], quality={})
    parse_sources(settings)
    report = filter_sources(settings)
    assert (report.sources[0].images, report.sources[0].undecodable) == (47, 1)
    assert "cannot be decoded              1 (any split, left out when parsed)" in report.render()


def test_filter_without_quality_is_refused(make_recipe: MakeRecipe) -> None:
    with pytest.raises(ConfigError, match="The recipe says `quality: null`"):
        filter_sources(make_recipe(quality=None))


@pytest.mark.parametrize("judge", [filter_sources, audit_sources])
def test_missing_manifest_says_what_to_run(make_recipe: MakeRecipe, judge: Callable[[BuildSettings], Any]) -> None:
    with pytest.raises(DataError, match=r"Source world: manifest .*world.parquet is missing .*chatreid parse CONFIG"):
        judge(make_recipe(quality={}))


def test_manifest_of_other_settings_is_refused(make_recipe: MakeRecipe, world: Path) -> None:
    parse_sources(make_recipe())
    with pytest.raises(DataError, match="made from other settings"):
        audit_sources(make_recipe(sources=[describe_source(world)]))


def test_source_that_is_only_tested_is_not_filtered_and_not_audited_as_training(
    make_recipe: MakeRecipe, world: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(world, tmp_path / "copy")
    sources = [describe_source(world), describe_source(copy, name="copy", stages=[])]
    settings = make_recipe(sources=sources, quality={})
    parse_sources(settings)
    assert [source.name for source in filter_sources(settings).sources] == ["world"]
    report = audit_sources(settings)
    assert (report.training, report.tested, report.leaks) == (48, 46, [])


def test_audit_finds_images_across_data_sets_and_in_further_manifests(
    make_recipe: MakeRecipe, world: Path, tmp_path: Path
) -> None:
    benchmark = shutil.copytree(world, tmp_path / "benchmark")
    query = sorted((benchmark / "query").iterdir())[0]
    # The copy keeps the published name, as ICFG-PEDES keeps MSMT17's.
    stolen = world / "bounding_box_train" / query.name
    shutil.copy(query, stolen)
    (world / "query" / query.name).unlink()
    elsewhere = make_recipe(sources=[describe_source(benchmark, name="benchmark")], manifest_dir=tmp_path / "other")
    parse_sources(elsewhere)
    settings = make_recipe(sources=[describe_source(world)])
    parse_sources(settings)
    person = query.name[:4]
    assert {leak.kind for leak in audit_sources(settings).leaks} == {"identity"}
    report = audit_sources(
        settings.model_copy(update={"audit_against": (tmp_path / "other" / "benchmark.parquet",)}),
        write=tmp_path / "leaks.jsonl",
    )
    assert [(leak.kind, leak.tested_image) for leak in report.leaks if leak.tested_dataset == "benchmark"] == [
        ("path", f"benchmark/query/{query.name}")
    ]
    assert report.list_images() == [f"world/bounding_box_train/{query.name}"]
    assert {leak.tested_person for leak in report.leaks} == {f"world:{person}", f"benchmark:{person}"}
    assert len((tmp_path / "leaks.jsonl").read_text().splitlines()) == len(report.leaks) == 2


def test_wrong_table_name_is_refused_before_the_audit(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"leaks.txt: the name must end in .csv or .jsonl"):
        audit_sources(make_recipe(), write=tmp_path / "leaks.txt")


def test_msmt17_test_people_among_icfg_pedes_training_people_are_reported(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    sources: list[dict[str, Any]] = []
    for layout in ("msmt17:v1", "icfgpedes", "ltcc"):
        name = layout.partition(":")[0]
        LAYOUTS[layout](tmp_path / name, 0)
        sources.append({"name": name, "root": tmp_path / name, "allow_count_mismatch": True})
    settings = make_recipe(sources=sources)
    parse_sources(settings)
    report = audit_sources(settings)
    pairs = {(leak.training_dataset, leak.tested_dataset, leak.kind) for leak in report.leaks}
    assert pairs == {("icfgpedes", "msmt17", "path"), ("msmt17", "icfgpedes", "path")}
    # Person 0 of ICFG-PEDES, trained, is person 0 of MSMT17's test set: three cameras, two images in each.
    reused = [leak for leak in report.leaks if leak.training_dataset == "icfgpedes"]
    assert len(reused) == 6
    assert {(leak.training_person, leak.tested_person) for leak in reused} == {("icfgpedes:0", "msmt17:test_0000")}
