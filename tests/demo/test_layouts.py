"""Tests of chatreid_plugin.demo.layouts: one synthetic layout in a new folder, whole or not at all."""

from pathlib import Path

import pytest

from chatreid_plugin.demo import layouts
from chatreid_plugin.demo.layouts import find_layout, write_layout
from chatreid_plugin.errors import ConfigError, DataError


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_layout_is_written_and_the_next_step_named(tmp_path: Path) -> None:
    target = tmp_path / "new" / "viper"
    message = write_layout("viper", target)
    assert message == f"8 labelled images. Next: chatreid inspect viper {target}"
    assert sorted(read_files(target))[0] == "VIPeR/cam_a/000_45.bmp"
    assert [path.name for path in target.parent.iterdir()] == ["viper"]


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "viper").mkdir()
    write_layout("viper", tmp_path / "viper")
    assert len(read_files(tmp_path / "viper")) == 9


def test_seed_names_the_files_contents(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("three", 5)):
        write_layout("viper", tmp_path / name, seed)
    one, two, three = (read_files(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two
    assert one.keys() == three.keys()
    assert one != three


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_nothing_is_overwritten(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "there"
    if kind == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match=r"there is not an empty folder\. Name a new one"):
        write_layout("viper", target)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["there" if kind == "file" else "mine.txt"]


def test_variant_is_the_first_unless_named(tmp_path: Path) -> None:
    assert find_layout("celebreid") == "celebreid:full"
    message = write_layout("celebreid:light", tmp_path / "set")
    assert message.endswith("--variant light")
    assert (tmp_path / "set" / "Celeb-reID-light").is_dir()


@pytest.mark.parametrize("name", ["duke", "viper:v2", "celeb", ""])
def test_unknown_layout_is_refused_with_those_known(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"There is no synthetic layout '{name}'\. Known: .*market1501, .*viper"):
        write_layout(name, tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(root: Path, seed: int) -> layouts.Layout:
        (root / "half.jpg").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setitem(layouts.LAYOUTS, "viper", fail)
    with pytest.raises(DataError, match="set cannot be written: disk full"):
        write_layout("viper", tmp_path / "set")
    assert list(tmp_path.iterdir()) == []
