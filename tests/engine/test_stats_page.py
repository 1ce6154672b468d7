"""Tests of chatreid_plugin.engine.stats_page: files, and a page that needs nothing else."""

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
from matplotlib import pyplot
from PIL import Image

from chatreid_plugin.config import BuildSettings
from chatreid_plugin.demo.world import WorldSummary
from chatreid_plugin.engine.build import build_datasets
from chatreid_plugin.engine.stats import Statistics, compute_statistics
from chatreid_plugin.engine.stats_page import (
    build_sections,
    draw_records,
    find_output,
    render_page,
    write_statistics,
)
from chatreid_plugin.html import encode_png


TOPICS = ["records", "galleries", "matches", "answers", "tokens", "identities", "sources", "wordings", "turns"]


@pytest.fixture(scope="module")
def dataset_dir(shared_world: WorldSummary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build records of all stages once."""
    root, world = tmp_path_factory.mktemp("stats"), shared_world.root
    source = {"name": "world", "parser": "market1501", "root": world, "captions": world / "captions.jsonl"}
    values = {
        "sources": [source | {"allow_count_mismatch": True}],
        "manifest_dir": root / "manifests",
        "output_dir": root / "dataset_info",
        "records": {"stage1": 10, "stage2": 100, "stage3": 60},
        "gallery": {"max_size": 5},
        "workers": 1,
    }
    build_datasets(BuildSettings.model_validate(values))
    return root / "dataset_info"


@pytest.fixture(scope="module")
def statistics(dataset_dir: Path) -> Statistics:
    return compute_statistics(dataset_dir)


def test_page_json_and_a_picture_of_each_topic_are_written_beside_the_data_sets(
    statistics: Statistics, dataset_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = write_statistics(dataset_dir)
    output = dataset_dir.with_name("dataset_info_stats")
    assert find_output(dataset_dir) == output
    names = {"stats.html", "stats.json", *(f"{topic}.png" for topic in TOPICS)}
    assert {path.name for path in output.iterdir()} == names
    assert json.loads((output / "stats.json").read_text(encoding="utf-8")) == json.loads(written.to_json())
    assert written == statistics
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "stats.html" in captured.err


def test_page_embeds_its_figures_and_needs_nothing_from_elsewhere(statistics: Statistics) -> None:
    names = ("chatreid_stage2_image_to_image_many_to_many", "chatreid_stage2_image_to_image_one_to_one")
    names += ("chatreid_stage3_dialogue_retrieval",)
    some = replace(statistics, datasets={name: statistics.datasets[name] for name in names})
    sections = list(build_sections(some))
    assert [section.topic for section in sections] == TOPICS
    pictures = {section.topic: encode_png(section.figure) for section in sections if section.figure is not None}
    text = render_page(some, sections, pictures)
    assert not re.search(r"https?://|<link|<script|url\(", text)
    sources = re.findall(r'<img src="([^"]*)"', text)
    assert len(sources) == len(TOPICS)
    for topic, source in zip(TOPICS, sources, strict=True):
        content = base64.b64decode(source.removeprefix("data:image/png;base64,"))
        assert content == pictures[topic]
        with Image.open(io.BytesIO(content)) as picture:
            assert min(picture.size) > 100
    for name in names:
        assert f"<td>{name.removeprefix('chatreid_')}</td>" in text
    assert "cutoff_len left images out" in text


def test_topics_without_data_are_left_out_or_said_to_be_missing(statistics: Statistics) -> None:
    name = "chatreid_stage2_attribute_prediction"
    bare = replace(
        statistics,
        datasets={name: statistics.datasets[name]},
        identities={},
        identities_left_out={"world": "no manifest there"},
    )
    sections = {section.topic: section for section in build_sections(bare)}
    assert list(sections) == ["records", "tokens", "identities", "sources", "wordings"]
    assert sections["identities"].figure is None
    assert "world: no manifest there." in sections["identities"].text


def test_page_escapes_what_comes_from_outside(statistics: Statistics) -> None:
    evil = "<script>x"
    name = "chatreid_stage2_attribute_prediction"
    sources = {evil: 10}
    changed = replace(
        statistics,
        dataset_dir=evil,
        datasets={name: replace(statistics.datasets[name], sources=sources)},
        left_out={evil: evil},
    )
    page = render_page(changed, list(build_sections(changed)), {})
    assert "<script" not in page
    assert page.count("&lt;script&gt;x") >= 4


def test_drawing_leaves_no_figure_and_no_backend_behind(statistics: Statistics) -> None:
    backend = matplotlib.get_backend()
    assert encode_png(draw_records(statistics.datasets)) == encode_png(draw_records(statistics.datasets))
    assert pyplot.get_fignums() == []
    assert matplotlib.get_backend() == backend
