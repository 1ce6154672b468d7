"""Tests of chatreid_plugin.engine.inspect: the catalog as `chatreid list` shows it, and what `inspect` finds."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from chatreid_plugin.datasets.catalog import CatalogEntry, read_catalog
from chatreid_plugin.demo.layouts import LAYOUTS
from chatreid_plugin.demo.world import WorldSummary
from chatreid_plugin.engine.inspect import (
    dump_catalog,
    find_entry,
    inspect_source,
    render_catalog,
    render_entry,
    simplify_name,
)
from chatreid_plugin.errors import ConfigError, DataError


MakeImage = Callable[..., Path]


def test_table_has_a_line_for_each_variant() -> None:
    table = render_catalog().partition("\n\n")[0].splitlines()
    names = [line.split()[0] for line in table[1:]]
    expected = [
        f"{name}:{variant}" if variant else name
        for name, entry in read_catalog().items()
        for variant in entry.variants or ("",)
    ]
    assert names == expected


def test_table_shows_counts_with_their_confidence_and_explains_them() -> None:
    lines = {line.split()[0]: line for line in render_catalog().splitlines() if line}
    market = lines["market1501"]
    columns = [lines["NAME"].index(name) for name in ("SETTING", "TRAIN", "VAL", "QUERY", "GALLERY", "USED FOR")]
    cells = [market[start:end].strip() for start, end in zip(columns, [*columns[1:], None], strict=True)]
    used_for = read_catalog()["market1501"].used_for
    assert cells == ["standard", "12,936/751 V", "-", "3,368/750 V", "15,913/750 V", used_for]
    assert "80,000 P" in lines["pa100k"]
    assert "34,674/3,102/34,674 P" in lines["icfgpedes"]
    assert "V counted in the published files, P stated by the authors, K widely reported" in render_catalog()


def test_count_without_images_has_a_question_mark() -> None:
    assert " ?/1,367 K" in render_catalog()


@pytest.mark.parametrize("name", read_catalog())
def test_entry_is_shown_whole(name: str) -> None:
    entry = read_catalog()[name]
    text = render_entry(name)
    assert text.startswith(f"{name}: {entry.title} ({entry.setting})\n")
    for part in (entry.used_for, entry.licence, entry.source, entry.file_name, *entry.variants, *entry.labels):
        assert part in text
    for line in entry.layout.splitlines():
        assert line in text
    for counts in entry.counts.values():
        for count in counts.values():
            numbers = [number for number in (count.images, count.identities, count.captions) if number is not None]
            assert all(f"{number:,}" in text for number in numbers)


def test_entry_without_counts_says_so() -> None:
    assert "counts\n  none published\n" in render_entry("pattern")


def test_json_is_the_catalog() -> None:
    found = {name: CatalogEntry.model_validate(entry) for name, entry in json.loads(dump_catalog()).items()}
    assert found == read_catalog()
    assert list(found) == list(read_catalog())


def test_json_of_one_entry_has_its_name() -> None:
    entry = json.loads(dump_catalog("Celeb-reID"))
    assert entry.pop("name") == "celebreid"
    assert CatalogEntry.model_validate(entry) == read_catalog()["celebreid"]


@pytest.mark.parametrize("name", ["Market-1501", "market1501", "MARKET 1501"])
def test_name_may_be_written_as_its_authors_do(name: str) -> None:
    assert simplify_name(name) == "market1501"
    assert find_entry(name) == read_catalog()["market1501"]


@pytest.mark.parametrize("name", ["market", "", "-", "MSMT17_V1"])
def test_unknown_name_is_refused_with_those_known(name: str) -> None:
    with pytest.raises(ConfigError, match=r"There is no data set .*market1501, .*pattern"):
        find_entry(name)


@pytest.mark.parametrize("name", ["duke", "DukeMTMC-reID", "Occluded-Duke", "P-DukeMTMC"])
def test_withdrawn_name_is_refused_with_the_reason(name: str) -> None:
    for show in (find_entry, render_entry, dump_catalog):
        with pytest.raises(ConfigError, match="withdrew it in 2019"):
            show(name)


def test_splits_are_counted(world: Path, shared_world: WorldSummary) -> None:
    summary = inspect_source("Market-1501", world)
    found = {
        split.split: (split.images, split.identities, split.cameras, split.modalities) for split in summary.splits
    }
    assert found == {
        "train": (48, 8, 3, {"visible": 48}),
        "query": (6, 3, 3, {"visible": 6}),
        "gallery": (17, 4, 3, {"visible": 17}),
    }
    assert summary.skipped["junk (identity -1)"] == shared_world.junk
    example = summary.splits[0].example
    assert (world / example["path"]).is_file()
    assert example["path"].startswith(f"bounding_box_train/{example['person']}_c{example['camera']}")


def test_other_counts_than_published_are_shown_and_do_not_fail(world: Path) -> None:
    summary = inspect_source("market1501", world)
    assert len(summary.warnings) == 6
    assert "split train has 48 images, Market-1501 has 12936" in summary.warnings[0]
    assert summary.warnings[0] in summary.render()


def test_no_image_is_opened(world: Path) -> None:
    before = inspect_source("market1501", world)
    for path in world.rglob("*.jpg"):
        path.write_bytes(b"")
    assert inspect_source("market1501", world) == before


def test_clothes_captions_and_modalities_are_counted(tmp_path: Path) -> None:
    LAYOUTS["vcclothes"](tmp_path / "clothes", 0)
    train = inspect_source("vcclothes", tmp_path / "clothes").splits[0]
    assert (train.identities, train.clothes, train.captions, train.attributed) == (3, 6, 0, 0)
    LAYOUTS["pa100k"](tmp_path / "attributes", 0)
    assert inspect_source("pa100k", tmp_path / "attributes").splits[0].attributed == 3


def test_variant_and_trial_are_handed_over(tmp_path: Path) -> None:
    LAYOUTS["celebreid:light"](tmp_path, 0)
    summary = inspect_source("celebreid", tmp_path, variant="light")
    assert (summary.variant, summary.root) == ("light", str(tmp_path / "Celeb-reID-light"))
    assert "celebreid, variant light, trial 1: " in summary.render()
    with pytest.raises(ConfigError, match="unknown variant 'dark'"):
        inspect_source("celebreid", tmp_path, variant="dark")
    LAYOUTS["peta"](tmp_path / "peta", 0)
    first, second = (inspect_source("peta", tmp_path / "peta", trial=trial) for trial in (1, 2))
    assert first.splits != second.splits


def test_default_variant_is_named(tmp_path: Path) -> None:
    LAYOUTS["celebreid:full"](tmp_path, 0)
    assert inspect_source("celebreid", tmp_path).variant == "full"
    shutil.rmtree(tmp_path / "Celeb-reID")
    LAYOUTS["viper"](tmp_path, 0)
    assert inspect_source("viper", tmp_path).variant is None


def test_long_protocol_is_given_by_its_size(tmp_path: Path) -> None:
    LAYOUTS["deepchange"](tmp_path, 0)
    assert (
        inspect_source("deepchange", tmp_path).protocol["tracklets"].startswith('24 entries, from {"test-set-query/')
    )
    LAYOUTS["vcclothes"](tmp_path / "short", 0)
    assert inspect_source("vcclothes", tmp_path / "short").protocol["cross_clothes_cameras"] == ["3", "4"]


def test_people_who_are_trained_and_tested_are_told(make_image: MakeImage, tmp_path: Path) -> None:
    for name in ("train/1-1-1-1.jpg", "train/2-1-1-1.jpg", "query/2-1-1-1.jpg", "gallery/3-1-1-1.jpg"):
        make_image(tmp_path / name)
    warnings = inspect_source("vcclothes", tmp_path).warnings
    assert warnings[-1].startswith("identities that are both in train and in query or gallery: 1 (2). If")


def test_own_folder_is_inspected_by_its_pattern(make_image: MakeImage, tmp_path: Path) -> None:
    for name in ("1/a_1.png", "1/b_1.png", "2/a_1.png", "2/b_1.png"):
        make_image(tmp_path / name, format="PNG")
    summary = inspect_source("pattern", tmp_path, pattern="{person}/{camera}_{index}.png")
    assert [(split.split, split.images) for split in summary.splits] == [("train", 2), ("gallery", 2)]
    with pytest.raises(ConfigError, match="needs `pattern`"):
        inspect_source("pattern", tmp_path)


def test_text_shows_every_part(tmp_path: Path) -> None:
    LAYOUTS["deepchange"](tmp_path, 0)
    text = inspect_source("deepchange", tmp_path).render()
    assert text.splitlines()[2].split() == [
        "SPLIT", "IMAGES", "IDENTITIES", "CAMERAS", "CLOTHES", "CAPTIONS", "ATTRIBUTES", "MODALITIES",
    ]  # fmt: skip
    assert text.splitlines()[3].split() == ["train", "24", "3", "2", "6", "0", "0", "24", "visible"]
    assert "example of gallery\n  path: test-set-gallery/P6_C01_1_000001.jpg\n  split: gallery\n  person: P6\n" in text
    assert "\nprotocol\n  tracklets: 24 entries" in text
    assert "captions:" not in text


def test_json_is_the_summary(tmp_path: Path) -> None:
    LAYOUTS["viper"](tmp_path, 0)
    summary = inspect_source("viper", tmp_path)
    value = json.loads(summary.to_json())
    assert value["skipped"] == {"not an image file": 1}
    assert value["splits"][0]["images"] == 8
    assert value["splits"][0]["example"]["path"] == "cam_a/000_45.bmp"
    assert value["warnings"] == list(summary.warnings)


@pytest.mark.parametrize("name", ["duke", "dukemtmcreid", "occludedduke", "pduke", "DukeMTMC-reID", "OCCLUDED-DUKE"])
def test_duke_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="withdrew it in 2019"):
        inspect_source(name, tmp_path)


@pytest.mark.parametrize("folder", ["DukeMTMC-reID", "DUKEMTMC-REID", "occluded_duke"])
def test_duke_is_refused_by_its_folder(world: Path, folder: str) -> None:
    with pytest.raises(ConfigError, match="withdrew it in 2019"):
        inspect_source("market1501", world.rename(world.with_name(folder)))


def test_unknown_set_and_wrong_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no data set 'nothing'"):
        inspect_source("nothing", tmp_path)
    with pytest.raises(DataError, match="lacks bounding_box_train, query, bounding_box_test of Market-1501"):
        inspect_source("market1501", tmp_path)
