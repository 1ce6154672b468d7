"""Tests of chatreid_plugin.engine.parsing: unreadable images, facts in the records, unknown and withdrawn sets."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from chatreid_plugin.config import SourceSettings
from chatreid_plugin.datasets.registry import list_source
from chatreid_plugin.engine import inspection
from chatreid_plugin.engine.inspection import inspect_image
from chatreid_plugin.engine.parsing import parse_source
from chatreid_plugin.errors import ConfigError, DataError
from chatreid_plugin.shards import write_manifest


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
    monkeypatch.setattr(inspection, "SMALLEST_PARALLEL", 2)
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
    inspect = inspection.inspect_image

    def inspect_and_note(path: Path) -> inspection.ImageFacts:
        decoded.append(path.name)
        return inspect(path)

    monkeypatch.setattr(inspection, "inspect_image", inspect_and_note)
    again = parse_source(make_source(), manifest=manifest)
    assert decoded == [changed.name]
    before = {record.path: record for record in first.records}
    assert [r.path for r in again.records if r != before[r.path]] == [f"query/{changed.name}"]
    assert parse_source(make_source(), manifest=tmp_path / "none.parquet").records == again.records
