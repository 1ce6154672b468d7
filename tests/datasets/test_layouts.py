"""Every synthetic layout parses to exactly what its writer meant: identities, cameras, splits, clothes, junk."""

from dataclasses import replace
from pathlib import Path

import pytest

from chatreid_plugin.config import SourceSettings
from chatreid_plugin.datasets.catalog import read_catalog
from chatreid_plugin.datasets.registry import list_datasets
from chatreid_plugin.demo.layouts import LAYOUTS
from chatreid_plugin.engine.manifests import parse_source
from chatreid_plugin.records import ImageRecord


def blank_facts(record: ImageRecord) -> ImageRecord:
    """Return the record without what only the pixels say."""
    return replace(record, content_hash="", perceptual_hash="", sharpness=None, brightness=None)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_layout_parses_to_what_was_written(layout: str, tmp_path: Path) -> None:
    name, _, variant = layout.partition(":")
    # A parent folder that looks like a label: only names inside the data set may be read.
    root = tmp_path / "2024_c1run" / "0007_c5s1"
    written = LAYOUTS[layout](root, 0)
    source = SourceSettings(name=name, root=root, variant=variant or None, allow_count_mismatch=True)
    report = parse_source(source)
    expected = sorted(written.records, key=lambda record: record.path)
    assert [blank_facts(record) for record in report.records] == expected
    assert {reason: report.skipped.get(reason) for reason in written.skipped} == written.skipped
    assert report.protocol == written.protocol
    assert report.root == written.root
    assert all(record.content_hash and record.perceptual_hash for record in report.records)


def test_every_parser_is_in_the_catalog() -> None:
    assert set(list_datasets()) == set(read_catalog())


def test_every_parser_of_a_published_set_has_a_layout() -> None:
    assert {layout.partition(":")[0] for layout in LAYOUTS} == set(list_datasets()) - {"pattern", "list"}


def test_every_variant_has_a_layout() -> None:
    expected = {
        f"{name}:{variant}" if variant else name
        for name, entry in read_catalog().items()
        for variant in entry.variants or ("",)
        if name not in ("pattern", "list")
    }
    assert set(LAYOUTS) == expected
