"""Tests of chatreid_plugin.datasets.catalog: complete entries, published counts against what is found."""

import re
from pathlib import Path

import pytest

from chatreid_plugin.config import SourceSettings
from chatreid_plugin.datasets import catalog
from chatreid_plugin.datasets.catalog import CATALOG_FILE, CatalogEntry, Count, check_counts, get_variant, read_catalog
from chatreid_plugin.datasets.listing import Crop
from chatreid_plugin.datasets.registry import list_datasets, list_source
from chatreid_plugin.demo.layouts import LAYOUTS
from chatreid_plugin.engine.manifests import parse_source
from chatreid_plugin.errors import ConfigError, DataError


LABELS = {"camera", "clothes", "modality", "captions", "attributes"}
CROPS = [Crop("a.jpg", "train", "1", "1", captions=("one", "two")), Crop("b.jpg", "gallery", "0000", "2")]


def set_counts(monkeypatch: pytest.MonkeyPatch, **counts: Count) -> None:
    """Replace Market-1501's published counts."""
    entry = read_catalog()["market1501"].model_copy(update={"counts": {"default": counts}})
    monkeypatch.setattr(catalog, "read_catalog", lambda: {"market1501": entry})


def make_source(**changes: object) -> SourceSettings:
    return SourceSettings.model_validate({"name": "market1501", "root": Path("raw")} | changes)


def test_every_parser_is_described() -> None:
    names = re.findall(r"^(\w+):$", CATALOG_FILE.read_text(encoding="utf-8"), re.MULTILINE)
    # YAML lets a second entry of a name replace the first.
    assert names == list(read_catalog())
    assert set(names) == set(list_datasets())


@pytest.mark.parametrize("name", read_catalog())
def test_entry_is_complete(name: str) -> None:
    entry = read_catalog()[name]
    for text in (entry.title, entry.layout, entry.file_name, entry.licence, entry.source, entry.used_for):
        assert text.strip()
    assert set(entry.labels) <= LABELS
    assert set(entry.counts) <= set(entry.variants or ("default",))
    assert len(set(entry.variants)) == len(entry.variants)
    if name not in ("pattern", "list"):
        assert "https://" in entry.source or "http://" in entry.source
        assert entry.licence.endswith(".")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_counts_name_the_splits_that_the_parser_gives(layout: str, tmp_path: Path) -> None:
    name, _, variant = layout.partition(":")
    LAYOUTS[layout](tmp_path / "set", 0)
    source = SourceSettings(name=name, root=tmp_path / "set", variant=variant or None, allow_count_mismatch=True)
    crops = list_source(source).crops
    counts = read_catalog()[name].counts.get(get_variant(source), {})
    assert set(counts) <= {crop.split for crop in crops}
    found = {
        "clothes": any(crop.clothes is not None for crop in crops),
        "captions": any(crop.captions for crop in crops),
        "attributes": any(crop.attributes for crop in crops),
        "modality": any(crop.modality == "infrared" for crop in crops),
        "camera": any(crop.camera != crop.path for crop in crops),
    }
    promised = set(read_catalog()[name].labels)
    assert {label for label in found if found[label]} == promised


def test_unknown_key_in_the_catalog_is_refused() -> None:
    entry = read_catalog()["market1501"].model_dump()
    with pytest.raises(ValueError, match="license"):
        CatalogEntry.model_validate(entry | {"license": "?"})


@pytest.mark.parametrize("confidence", ["V", "P"])
def test_other_counts_are_refused(monkeypatch: pytest.MonkeyPatch, confidence: str) -> None:
    set_counts(monkeypatch, train=Count.model_validate({"images": 2, "confidence": confidence}))
    with pytest.raises(DataError, match=r"raw: split train has 1 images, Market-1501 has 2\. .*allow_count_mismatch"):
        check_counts(make_source(), CROPS)
    assert check_counts(make_source(allow_count_mismatch=True), CROPS) == [
        "raw: split train has 1 images, Market-1501 has 2"
    ]


def test_other_counts_that_are_only_reported_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    set_counts(monkeypatch, train=Count(images=2, identities=5, captions=3, confidence="K"))
    assert check_counts(make_source(), CROPS) == [
        "raw: split train has 1 images, Market-1501 has 2",
        "raw: split train has 1 identities, Market-1501 has 5",
        "raw: split train has 2 captions, Market-1501 has 3",
    ]


def test_missing_split_is_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    set_counts(monkeypatch, val=Count(images=3, confidence="V"))
    with pytest.raises(DataError, match="split val has 0 images, Market-1501 has 3"):
        check_counts(make_source(), CROPS)


def test_agreeing_and_unknown_counts_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    # Market-1501's distractors (0000) are nobody.
    set_counts(
        monkeypatch,
        train=Count(images=1, captions=2, confidence="V"),
        gallery=Count(images=1, identities=0, confidence="V"),
    )
    assert check_counts(make_source(), CROPS) == []


def test_variant_is_the_first_unless_named() -> None:
    assert get_variant(make_source()) == "default"
    assert get_variant(make_source(name="celebreid")) == "full"
    assert get_variant(make_source(name="celebreid", variant="light")) == "light"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("celebreid", r"Source celebreid: unknown variant 'v9'\. celebreid has full, light\."),
        ("viper", r"Source viper: unknown variant 'v9'\. viper has none\."),
    ],
)
def test_unknown_variant_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_variant(make_source(name=name, variant="v9"))


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "duke"},
        {"name": "dukemtmcreid"},
        {"name": "occludedduke"},
        {"name": "pduke"},
        {"name": "mine", "parser": "DukeMTMC-reID"},
        {"root": Path("raw/DukeMTMC-reID")},
        {"root": Path("raw/OCCLUDED_DUKE")},
        {"root": Path("raw/DukeMTMC-reID/bounding_box_train")},
        {"root": Path("raw/P-DukeMTMC-reID/train/x")},
        {"name": "mine", "parser": "pattern", "pattern": "{person}.jpg", "root": Path("raw/P-DukeMTMC-reID")},
    ],
)
def test_duke_is_refused_by_name(changes: dict[str, object]) -> None:
    for read in (list_source, parse_source):
        with pytest.raises(ConfigError, match=r"DukeMTMC .*withdrew it in 2019.*section 5.*Use another data set"):
            read(make_source(**changes))
