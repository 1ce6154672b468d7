"""Tests of chatreid_plugin.engine.catalog_view: the table of data sets, one entry whole, JSON."""

import json

import pytest

from chatreid_plugin.engine.catalog import CatalogEntry, read_catalog
from chatreid_plugin.engine.catalog_view import (
    align_columns,
    dump_catalog,
    find_entry,
    render_catalog,
    render_entry,
    simplify_name,
)
from chatreid_plugin.errors import ConfigError


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


def test_columns_are_aligned_and_lines_have_no_blanks_at_their_end() -> None:
    assert align_columns([("a", "bbb", "c"), ("aa", "b", "")]) == "a   bbb  c\naa  b"
