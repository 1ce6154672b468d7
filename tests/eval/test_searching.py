"""``chatreid rank``: one's own folder for a photo or words, by the evaluator's parts, without labels."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chatreid_plugin import cli
from chatreid_plugin.datasets.benchmark import Query
from chatreid_plugin.errors import ConfigError, DataError
from chatreid_plugin.eval.backends.transformers import TransformersScorer
from chatreid_plugin.eval.searching import rank_folder
from chatreid_plugin.records import ImageRecord
from tests.support import make_eval_settings


COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    """Write a folder of six plain crops in two subfolders, a damaged file and a note; the photo lies beside it."""
    folder = tmp_path / "gallery"
    for number, colour in enumerate(COLOURS):
        file = folder / str(number % 2) / f"{colour}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 80 + number), colour).save(file)
    (folder / "0" / "damaged.jpg").write_bytes(b"no picture")
    (folder / "0" / os.fsdecode(b"\xff.png")).write_bytes((folder / "0" / "red.png").read_bytes())
    (folder / "note.txt").touch()
    (folder / "1" / "loop").symlink_to(folder)
    Image.new("RGB", (50, 90), (250, 5, 5)).save(tmp_path / "photo.png")
    return folder


def test_ranks_by_colours_where_there_is_no_model(
    gallery: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = rank_folder(gallery, tmp_path / "photo.png", "", None, top=4)
    assert [found.rank for found in search.found] == [1, 2, 3, 4]
    assert search.found[0].path == "0/red.png" and search.images == 6
    assert (
        list(search.unreadable) == ["0/damaged.jpg", r"0/\udcff.png"]
        and "cannot be read as an image" in search.render()
    )
    assert "6 images" in search.title and search.title.endswith("colour features alone, no model")

    command = [
        "rank",
        str(gallery),
        "--image",
        str(tmp_path / "photo.png"),
        "--json",
        "filter.top_k=2",
        "filter.floor=0",
    ]
    cli.app([*command, "--html", str(tmp_path / "page.html")], standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    assert [found["path"] for found in told["found"]][0] == "0/red.png"
    assert [found["score"] is None for found in told["found"]] == [False] * 2 + [True] * 4
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg") == 7 and "http" not in page and "damaged.jpg" in page
    assert "is not UTF-8" in page


@pytest.mark.slow
def test_the_model_scores_as_it_does_in_an_evaluation(gallery: Path, tmp_path: Path, checkpoint: Path) -> None:
    photo, own = tmp_path / "photo.png", ["model.device=cpu", "model.dtype=float32"]
    search = rank_folder(gallery, photo, "", str(checkpoint), [*own, "filter.top_k=3", "filter.floor=0"], stage=2)
    assert [found.score is None for found in search.found] == [False] * 3 + [True] * 3
    scores = [found.score for found in search.found[:3] if found.score is not None]
    assert scores == sorted(scores, reverse=True)
    values = {"protocol": "folder", "manifest": "m", "output_dir": "o", "model_name_or_path": str(checkpoint)}
    values |= {"device": "cpu", "dtype": "float32", "chatreid_stage": 2}
    scorer = TransformersScorer(make_eval_settings(values).model, gallery)

    def describe(file: Path) -> ImageRecord:
        return ImageRecord(str(file), "x", "gallery", str(file), "", "", *Image.open(file).size)

    records = [describe(gallery / found.path) for found in search.found[:3]]
    expected = scorer.score_pairs(Query("q", "", image=describe(photo)), records, "image_to_image_one_to_one")
    np.testing.assert_allclose(scores, expected, atol=1e-4)

    words = rank_folder(gallery, None, "a woman in red", str(checkpoint), own, stage=2)
    expected = scorer.score_pairs(Query("q", "", text="a woman in red"), records, "text_to_image_one_to_one")
    told = {found.path: found.score for found in words.found if found.score is not None}
    np.testing.assert_allclose([told[found.path] for found in search.found[:3]], expected, atol=1e-4)
    assert words.scored == 6
    both = rank_folder(gallery, photo, "a woman in red", str(checkpoint), own, stage=2)
    assert {found.path for found in both.found} == set(told) and f'{photo} and "a woman in red"' in both.title


def test_refuses_what_cannot_be_ranked(gallery: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    with pytest.raises(ConfigError, match="Nothing is searched for"):
        rank_folder(gallery, None, "", None)
    with pytest.raises(ConfigError, match="--text needs --model"):
        rank_folder(gallery, None, "a man", None)
    with pytest.raises(ConfigError, match="--text needs --model"):
        rank_folder(gallery, photo, "a man", None)
    with pytest.raises(ConfigError, match="backend: oracle knows nothing"):
        rank_folder(gallery, photo, "", None, ["scoring.backend=oracle"])
    with pytest.raises(DataError, match="is not a folder"):
        rank_folder(photo, photo, "", None)
    with pytest.raises(DataError, match="cannot be read as an image"):
        rank_folder(gallery, gallery / "note.txt", "", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no image that can be read"):
        rank_folder(tmp_path / "empty", photo, "", None)
