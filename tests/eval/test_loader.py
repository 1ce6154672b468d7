"""Tests of chatreid_plugin.eval.loader: splits, the camera rule, queries without a match, missing files."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from chatreid_plugin.datasets.matching import label_benchmark
from chatreid_plugin.errors import ConfigError, DataError
from chatreid_plugin.eval.loader import load_benchmark, take_evenly
from chatreid_plugin.eval.settings import EvalSettings


MakeWorld = Callable[..., Path]
MakeSettings = Callable[..., EvalSettings]


def test_ignores_own_identity_in_own_camera(make_world: MakeWorld, make_settings: MakeSettings) -> None:
    benchmark = load_benchmark(make_settings(make_world(), protocol="market1501").data)
    assert (len(benchmark.queries), len(benchmark.gallery), benchmark.skipped) == (4, 12, ())
    labels = label_benchmark(benchmark)
    for query, record in enumerate(benchmark.queries):
        same = [item.person_id == record.person_id for item in benchmark.gallery]
        own = [item.camera_id == record.camera_id for item in benchmark.gallery]
        assert labels.find_ignored(query).tolist() == [s and o for s, o in zip(same, own, strict=True)]
        assert labels.find_positives(query).tolist() == [s and not o for s, o in zip(same, own, strict=True)]


def test_ignores_nothing_when_camera_rule_is_off(make_world: MakeWorld, make_settings: MakeSettings) -> None:
    labels = label_benchmark(load_benchmark(make_settings(make_world(), camera_rule=False).data))
    assert not labels.find_ignored(0).any()
    assert labels.find_positives(0).sum() == 3


def test_refuses_to_switch_off_the_rule_of_a_published_protocol(
    make_world: MakeWorld, make_settings: MakeSettings
) -> None:
    with pytest.raises(ConfigError, match="data.benchmark: folder"):
        load_benchmark(make_settings(make_world(), protocol="market1501", camera_rule=False).data)


def test_skips_queries_without_a_match_and_says_why(
    make_world: MakeWorld, make_settings: MakeSettings, caplog: pytest.LogCaptureFixture
) -> None:
    items = [("query", "1", "1"), ("query", "2", "1"), ("query", "3", "1")]
    items += [("gallery", "1", "2"), ("gallery", "2", "1"), ("gallery", "4", "2")]
    with caplog.at_level(logging.WARNING):
        benchmark = load_benchmark(make_settings(make_world(items)).data)
    assert [record.person_id for record in benchmark.queries] == ["tiny:1"]
    assert [item.reason for item in benchmark.skipped] == [
        "identity tiny:2 is only seen by the query's own camera 1",
        "identity tiny:3 is absent from the gallery",
    ]
    assert "2 of 3 queries" in caplog.text
    assert "They are skipped" in caplog.text


def test_lists_ten_of_many_skipped_queries(
    make_world: MakeWorld, make_settings: MakeSettings, caplog: pytest.LogCaptureFixture
) -> None:
    items = [("query", "1", "1"), ("gallery", "1", "2")] + [("query", "2", str(camera)) for camera in range(12)]
    load_benchmark(make_settings(make_world(items)).data)
    assert caplog.text.count("is absent from the gallery") == 10
    assert "and 2 more" in caplog.text


def test_says_what_to_do_when_no_query_has_a_match(make_world: MakeWorld, make_settings: MakeSettings) -> None:
    manifest = make_world([("query", "1", "1"), ("gallery", "1", "1")])
    with pytest.raises(DataError, match="camera_rule=false"):
        load_benchmark(make_settings(manifest).data)
    assert len(load_benchmark(make_settings(manifest, camera_rule=False).data).queries) == 1


def test_names_the_benchmark_when_it_leaves_no_query(make_world: MakeWorld, make_settings: MakeSettings) -> None:
    expected = r"no query is left by benchmark prcc \(cross-clothes \(camera C in A\), multi-shot, nothing ignored\)"
    with pytest.raises(DataError, match=expected):
        load_benchmark(make_settings(make_world(), protocol="prcc").data)


def test_market_distractors_match_nobody(make_world: MakeWorld, make_settings: MakeSettings) -> None:
    items = [("query", "1", "1"), ("query", "0", "1"), ("gallery", "1", "2"), ("gallery", "0000", "2")]
    items += [("gallery", "0", "2")]
    manifest = make_world(items)
    benchmark = load_benchmark(make_settings(manifest, protocol="market1501").data)
    assert [record.person_id for record in benchmark.queries] == ["tiny:1"]
    assert len(benchmark.gallery) == 3
    assert label_benchmark(benchmark).find_positives(0).sum() == 1


@pytest.mark.parametrize("items", [[("gallery", "1", "1")], [("query", "1", "1")], [("train", "1", "1")]])
def test_refuses_a_manifest_without_queries_or_gallery(
    make_world: MakeWorld, make_settings: MakeSettings, items: list[tuple[str, str, str]]
) -> None:
    with pytest.raises(DataError, match="an evaluation needs both"):
        load_benchmark(make_settings(make_world(items)).data)


def test_names_missing_images_and_the_root(make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path) -> None:
    manifest = make_world(images=False)
    with pytest.raises(DataError) as caught:
        load_benchmark(make_settings(manifest, filter="colour").data)
    assert "16 image file(s)" in str(caught.value)
    assert str(tmp_path / "images") in str(caught.value)
    assert str(caught.value).count(".png") == 10


def test_reads_images_from_another_root(make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path) -> None:
    manifest = make_world()
    (tmp_path / "images").rename(tmp_path / "moved")
    benchmark = load_benchmark(make_settings(manifest, image_root=tmp_path / "moved").data)
    assert benchmark.image_root == tmp_path / "moved"


def test_max_queries_is_even_and_repeatable(make_world: MakeWorld, make_settings: MakeSettings) -> None:
    settings = make_settings(make_world(), max_queries=2)
    persons = [record.person_id for record in load_benchmark(settings.data).queries]
    assert persons == ["tiny:1", "tiny:3"]
    records = load_benchmark(make_settings(settings.data.manifest).data).gallery
    assert take_evenly(records, 5) == [records[place] for place in (0, 2, 4, 7, 9)]
    assert take_evenly(records, 99) == records
