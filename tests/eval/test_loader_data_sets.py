"""Tests of chatreid_plugin.eval.loader: which manifests a benchmark takes, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatreid_plugin.errors import DataError
from chatreid_plugin.eval.loader import load_benchmark
from chatreid_plugin.eval.settings import EvalSettings
from chatreid_plugin.shards import read_json


MakeWorld = Callable[..., Path]
MakeSettings = Callable[..., EvalSettings]
ParseLayout = Callable[[str], Path]


@pytest.mark.parametrize(
    ("layout", "keys", "message"),
    [
        (
            "market1501",
            {"protocol": "ltcc"},
            "holds the data set market1501.*set data.benchmark: market1501.*benchmark: folder",
        ),
        ("ltcc", {"protocol": "market1501"}, "holds the data set ltcc"),
        ("sysumm01", {"protocol": "market1501"}, "holds the data set sysumm01"),
        ("sysumm01", {"protocol": "llcm"}, "set data.benchmark: sysumm01"),
        ("sysumm01", {"protocol": "msmt17", "variant": "v2"}, "set data.benchmark: sysumm01"),
        ("cuhkpedes", {"protocol": "market1501"}, "set data.benchmark: cuhkpedes"),
        ("cuhk03:detected", {"protocol": "market1501"}, "set data.benchmark: cuhk03 or cuhk03_classic"),
        ("rapv1", {"protocol": "market1501"}, "no benchmark fits it"),
        (
            "msmt17:v1",
            {"protocol": "msmt17", "variant": "v2"},
            "form v1, but the settings say data.variant: v2",
        ),
        ("cuhk03:labeled_np", {"protocol": "cuhk03", "variant": "detected"}, "in the form labeled_np"),
    ],
)
def test_refuses_the_manifest_of_another_data_set(
    layout: str, keys: dict[str, Any], message: str, parse_layout: ParseLayout, make_settings: MakeSettings
) -> None:
    with pytest.raises(DataError, match=message):
        load_benchmark(make_settings(parse_layout(layout), **keys).data)


@pytest.mark.parametrize(
    ("layout", "keys"),
    [
        ("msmt17:v2", {"protocol": "msmt17", "variant": "v2"}),
        ("cuhk03:labeled_np", {"protocol": "cuhk03", "variant": "labeled"}),
        ("sysumm01", {"protocol": "folder"}),
    ],
)
def test_takes_a_manifest_that_fits(
    layout: str, keys: dict[str, Any], parse_layout: ParseLayout, make_settings: MakeSettings
) -> None:
    assert load_benchmark(make_settings(parse_layout(layout), **keys).data).queries


def rename(manifest: Path, **source: Any) -> None:
    """Write other provenance under a manifest: a source of this kind."""
    file = manifest.with_name(manifest.name + ".json")
    file.write_text(json.dumps(read_json(file) | {"source": source}))


def test_data_of_ones_own_goes_by_its_parser_and_name(make_world: MakeWorld, make_settings: MakeSettings) -> None:
    manifest = make_world()
    settings = make_settings(manifest, protocol="market1501")
    assert load_benchmark(settings.data).queries  # a manifest that no parser made, of an unknown name
    for name, parser in (("world", "market1501"), ("market1501", "pattern"), ("market1501", None)):
        rename(manifest, name=name, parser=parser)
        assert load_benchmark(settings.data).queries
    for name, parser in (("mine", "pattern"), ("ltcc", "pattern"), ("market1501", "ltcc")):
        rename(manifest, name=name, parser=parser)
        with pytest.raises(DataError, match="benchmark: folder"):
            load_benchmark(settings.data)
        assert load_benchmark(make_settings(manifest).data).queries


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"protocol": "ltcc"}, "no query and no gallery image has a clothes label"),
        ({"protocol": "regdb"}, "one side must be infrared"),
        ({"protocol": "cuhkpedes"}, "no gallery image has a caption"),
    ],
)
def test_refuses_a_manifest_without_the_labels_of_the_rules(
    keys: dict[str, Any],
    message: str,
    make_world: MakeWorld,
    make_settings: MakeSettings,
) -> None:
    with pytest.raises(DataError, match=message):
        load_benchmark(make_settings(make_world(), **keys).data)
