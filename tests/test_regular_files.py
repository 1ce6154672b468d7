"""Tests of chatreid_plugin.regular_files, and that every reader of strangers' files uses it: none may hang."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatreid_plugin.archives import map_array, open_archive
from chatreid_plugin.config import BuildSettings, load_settings
from chatreid_plugin.engine.image_facts import inspect_image
from chatreid_plugin.errors import ChatReIDError
from chatreid_plugin.pixels import open_crop
from chatreid_plugin.records import IMAGE_RECORD_SCHEMA
from chatreid_plugin.regular_files import check_regular, read_regular
from chatreid_plugin.shards import check_shard, read_json, read_json_lines, read_shard, read_text
from chatreid_plugin.training.images import decode_image


def test_files_and_links_to_them_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").symlink_to("a")
    assert read_regular(tmp_path / "b") == b"abc"
    check_regular(tmp_path / "b")


READERS: list[Callable[[Path], Any]] = [
    open_crop,
    inspect_image,
    read_text,
    read_json,
    lambda path: list(read_json_lines(path)),
    lambda path: read_shard(path, IMAGE_RECORD_SCHEMA),
    check_shard,
    lambda path: open_archive(path, ["a"]),
    map_array,
    lambda path: load_settings(path, [], BuildSettings),
    lambda path: decode_image({"path": str(path)}),
]


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize("read", READERS)
def test_pipes_and_devices_are_refused_at_once(tmp_path: Path, kind: str, read: Callable[[Path], Any]) -> None:
    path = tmp_path / "a"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(ChatReIDError):
        read(path)
