"""A new data set with a benchmark is four files' work: its module, catalogue entry, synthetic layout and one YAML."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from chatreid_plugin import datasets
from chatreid_plugin.cli import app
from chatreid_plugin.config import SourceSettings, load_settings
from chatreid_plugin.datasets import catalog, registry
from chatreid_plugin.demo import layouts
from chatreid_plugin.errors import ConfigError
from chatreid_plugin.eval.__main__ import main
from chatreid_plugin.eval.settings import EvalSettings
from chatreid_plugin.shards import read_json


MODULE = """
import re
from chatreid_plugin.datasets.benchmark import BenchmarkRules
from chatreid_plugin.datasets.listing import Crop, DataSet, Listing, find_named

NAME = re.compile(r"(?P<person>\\d)_(?P<camera>\\d)_(?P<part>train|query|gallery)\\.png")


def list_toy(source):
    listing = Listing(source.root)
    for path, match in find_named(listing, source.root, NAME, "1_2_query.png"):
        listing.crops.append(Crop(path, match["part"], match["person"], match["camera"]))
    return listing


def load_toy(source, choices):
    return source.ask_with_images(f"{choices.setting} toys", "nothing" if choices.setting == "all" else "same_camera")


DATASETS = {"toy": DataSet(list_toy)}
BENCHMARKS = {
    "toy": BenchmarkRules(load_toy, "toy", choices={"setting": ("some", "all")}, sizes={("some",): (2, 4)})
}
"""
ENTRY = """
toy:
  title: Toy
  setting: standard
  layout: "*.png"
  file_name: 1_2_query.png
  counts: {default: {query: {images: 2, identities: 2, confidence: V}}}
  licence: Free.
  source: this test
  used_for: a test
  labels: [camera]
"""
LAYOUT = """
from chatreid_plugin.demo.layouts.renderer import Layout, Renderer


def write_toy(root, seed=0):
    layout, renderer = Layout(root), Renderer("toy", seed)
    for person, camera, split in ((1, 1, "query"), (2, 1, "query"), (1, 1, "gallery"), (1, 2, "gallery"),
                                  (2, 1, "gallery"), (2, 2, "gallery"), (3, 1, "train")):
        image, _ = renderer.render(person, camera, 0)
        path = f"{person}_{camera}_{split}.png"
        renderer.add(layout, image, path, split=split, person=str(person), camera=str(camera))
    return layout


LAYOUTS = {"toy": write_toy}
"""
YAML = """
data: {{benchmark: toy, manifest: {manifest}}}
filter: {{source: none}}
scoring: {{backend: oracle}}
output: {{output_dir: {output}}}
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put the files where a contributor would, and forget them afterwards; return the YAML."""
    for folder, text in (("sets", MODULE), ("layouts", LAYOUT)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "toy.py").write_text(text)
    entries = tmp_path / "catalog.yaml"
    entries.write_text(catalog.CATALOG_FILE.read_text() + ENTRY)
    yaml = tmp_path / "toy.yaml"
    yaml.write_text(YAML.format(manifest=tmp_path / "manifests" / "toy.parquet", output=tmp_path / "out"))
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "__path__", [*datasets.__path__, str(tmp_path / "sets")])
        patch.setattr(layouts, "__path__", [*layouts.__path__, str(tmp_path / "layouts")])
        patch.setattr(catalog, "CATALOG_FILE", entries)
        forget()
        patch.setattr(layouts, "LAYOUTS", layouts.find_layouts())
        yield yaml
    forget()


def forget() -> None:
    registry.load_modules.cache_clear()
    catalog.read_catalog.cache_clear()


def test_new_data_set_is_written_parsed_and_measured(toy: Path, tmp_path: Path) -> None:
    assert "chatreid inspect toy" in layouts.write_layout("toy", tmp_path / "raw")
    listing = registry.list_source(SourceSettings(name="toy", root=tmp_path / "raw"))
    assert len(listing.crops) == 7 and not listing.warnings
    assert "Toy" in CliRunner().invoke(app, ["list", "toy"]).stdout

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"sources: [{{name: toy, root: {tmp_path / 'raw'}}}]\nmanifest_dir: {tmp_path / 'manifests'}\n")
    parsed = CliRunner().invoke(app, ["parse", str(recipe), "workers=1"])
    assert parsed.exit_code == 0, parsed.output
    assert main([str(toy)]) == 0
    content = read_json(tmp_path / "out" / "results.json")
    assert content["protocol"]["name"] == "toy"
    assert content["protocol"]["variant"] == "some toys, same identity and same camera ignored"
    assert content["protocol"]["unlike_published"] == "" and content["metrics"]["mAP"] == 1.0
    assert load_settings(toy, ["data.setting=all"], EvalSettings).data.choose("setting") == "all"
    with pytest.raises(ConfigError, match="data.setting: cc does not fit benchmark toy; choose one of some, all"):
        load_settings(toy, ["data.setting=cc"], EvalSettings)


def test_unknown_benchmark_is_refused_and_the_nearest_named(toy: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data.benchmark: 'toys' is no benchmark; did you mean toy\? known: .*market1501"
    ):
        load_settings(toy, ["data.benchmark=toys"], EvalSettings)
