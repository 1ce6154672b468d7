"""Galleries and their index: what is listed, computed once, resumed and picked up later."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chatreid_plugin.errors import ConfigError, DataError
from chatreid_plugin.eval.backends import encoder
from chatreid_plugin.locks import open_locked
from chatreid_plugin.search.gallery import LINES, Gallery, Index, list_gallery, read_gallery
from chatreid_plugin.search.ranking import Searcher, make_settings
from tests.conftest import Workshop
from tests.search.conftest import OWN


def read(source: Path) -> Gallery:
    return read_gallery(source, list_gallery(source), {})


def test_a_folder_has_each_picture_once_and_says_what_it_cannot_read(folder: Path) -> None:
    shutil.copy(folder / "0" / "blue.png", folder / "1" / "again.png")
    found = read(folder)
    assert len(found.images) == 12
    assert found.images[0].paths == ("0/blue.png", "1/again.png")
    assert list(found.unreadable) == ["0/damaged.jpg", r"0/\udcff.png"]
    assert "is not UTF-8" in found.unreadable[r"0/\udcff.png"]
    assert [found.places[record.image_id] for record in found.records] == list(range(12))


def test_a_list_has_labels(write_list: Callable[[], Path]) -> None:
    path = write_list()
    found = read(path)
    first = found.images[0]
    assert (first.record.path, first.record.camera_id) == ("photos/0/blue.png", "c0")
    assert dict(first.record.attributes) == {"colour": "blue", "shade": "0"}
    assert first.time is not None and first.time.isoformat() == "2026-03-01T10:00:00"
    path.write_text("path,time\nphotos/0/red.png,yesterday", encoding="utf-8")
    with pytest.raises(DataError, match=r"line 2: 'yesterday' is not a time"):
        read(path)
    path.write_text("path\n../red.png", encoding="utf-8")
    with pytest.raises(DataError, match=r"line 2: the path '../red.png' is not below"):
        read(path)


def test_a_manifest_gives_its_gallery(workshop: Workshop) -> None:
    found = read(workshop.root / "manifests" / "world.parquet")
    assert {record.split for record in found.records} == {"gallery"}
    assert found.images[0].record.attributes and found.root == workshop.images


def test_refuses_what_is_no_gallery(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder, a .csv list or a manifest"):
        list_gallery(tmp_path / "photo.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no image that can be read"):
        read(tmp_path / "empty")
    with pytest.raises(ConfigError, match="--index: .* cannot be made"):
        Searcher(folder, make_settings(None), tmp_path / "photo.png" / "x")


def read_files(index: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(index.iterdir())}


@pytest.mark.slow
def test_a_killed_index_goes_on_and_has_the_same_bytes(
    folder: Path, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "ENCODE_BATCH", 2)
    settings = make_settings(str(checkpoint), OWN)
    whole = Searcher(folder, settings, tmp_path / "whole")
    assert len(read_files(whole.index.folder)["images.jsonl"].splitlines()) == 1 + 6

    def stop(done: int, count: int) -> None:
        assert count == 12 - before
        if done >= 4:
            raise KeyboardInterrupt

    before = 0
    with pytest.raises(KeyboardInterrupt):
        Searcher(folder, settings, tmp_path / "killed", stop)
    (part,) = (tmp_path / "killed").glob("*/images.jsonl")
    # As if it had been killed within a line, and after features that no line knows.
    part.write_bytes(part.read_bytes() + b'{"width": 64, "ima')
    (part.parent / "vision.bin").open("ab").write(b"torn")
    (part.parent / "features.f32").open("ab").write(b"torn")
    seen: list[int] = []
    resumed = Searcher(folder, settings, tmp_path / "killed", lambda done, count: seen.append(count))
    assert seen == [8, 8, 8, 8]
    assert read_files(resumed.index.folder) == read_files(whole.index.folder)
    assert resumed.features is not None and whole.features is not None
    np.testing.assert_array_equal(resumed.features, whole.features)


def test_what_is_added_removed_or_renamed_later_is_picked_up(folder: Path) -> None:
    first = Searcher(folder, make_settings(None))
    (folder / "0" / "red.png").rename(folder / "0" / "renamed.png")
    (folder / "1" / "green.png").unlink()
    Image.new("RGB", (30, 60), "white").save(folder / "2.png")
    computed: list[int] = []
    second = Searcher(folder, make_settings(None), progress=lambda done, count: computed.append(count))
    assert computed == [1]
    assert {"0/renamed.png", "2.png"} < {one.record.path for one in second.gallery.images}
    assert len(second.gallery.images) == 12
    assert first.features is not None and second.features is not None
    for image_id, place in second.gallery.places.items():
        if image_id in first.gallery.places:
            np.testing.assert_array_equal(second.features[place], first.features[first.gallery.places[image_id]])


def test_two_do_not_write_one_index_and_damage_is_told(folder: Path) -> None:
    searcher = Searcher(folder, make_settings(None))
    lines = searcher.index.folder / LINES
    Image.new("RGB", (30, 60), "white").save(folder / "2.png")
    with open_locked(lines, "search"), pytest.raises(ConfigError, match="--index: another search is writing"):
        Searcher(folder, make_settings(None))
    lines.write_bytes(lines.read_bytes() + b"{}\n")
    with pytest.raises(DataError, match=r"images.jsonl, line 3: damaged"):
        Searcher(folder, make_settings(None))


def test_another_filter_has_an_index_of_its_own(tmp_path: Path) -> None:
    folders = {Index(tmp_path, {"source": source}).folder for source in ("colour", "vlm", "colour")}
    assert len(folders) == 2
