"""Tests of chatreid_plugin.datasets.label_files: sound MATLAB files, and those that unpack to more than is wanted."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from chatreid_plugin.datasets import label_files
from chatreid_plugin.datasets.label_files import read_matlab
from chatreid_plugin.errors import DataError


@pytest.mark.parametrize(("version", "packed"), [("4", False), ("5", False), ("5", True)])
def test_file_of_every_version_is_read(tmp_path: Path, version: str, packed: bool) -> None:
    savemat(tmp_path / "a.mat", {"labels": np.eye(3)}, format=version, do_compression=packed)
    assert read_matlab(tmp_path / "a.mat")["labels"].tolist() == np.eye(3).tolist()


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the process that reads have 64 MiB."""
    label_files._CHILD.end()
    monkeypatch.setattr(label_files, "MOST_BYTES", 2**26)
    yield
    label_files._CHILD.end()


@pytest.mark.usefixtures("small_memory")
def test_file_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    savemat(tmp_path / "a.mat", {"a": np.zeros(2**24)}, do_compression=True)
    assert (tmp_path / "a.mat").stat().st_size < 200_000
    with pytest.raises(
        DataError, match=r"a\.mat cannot be read as a MATLAB file .*: (MemoryError|.*memory|.*allocate)"
    ):
        read_matlab(tmp_path / "a.mat")


def test_reader_that_dies_is_one_message_and_starts_again(tmp_path: Path) -> None:
    savemat(tmp_path / "a.mat", {"labels": np.eye(3)})
    assert read_matlab(tmp_path / "a.mat")
    process = label_files._CHILD.process
    assert process is not None
    process.kill()
    process.wait()
    with pytest.raises(DataError, match=r"a\.mat cannot be read .*: SciPy crashed on it\. Get the published file"):
        read_matlab(tmp_path / "a.mat")
    assert read_matlab(tmp_path / "a.mat")


def test_damage_that_scipy_does_not_survive_ends_no_more_than_the_file(tmp_path: Path) -> None:
    sound, damaged = tmp_path / "a.mat", tmp_path / "b.mat"
    savemat(sound, {"a": {"b": np.array(["x", "y"], object), "c": np.eye(2)}})
    content = bytearray(sound.read_bytes())
    for place in (268, 288, 344):  # each ended SciPy 1.17's process
        damaged.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
        with suppress(DataError):
            read_matlab(damaged, simplify=True)
        assert read_matlab(sound, simplify=True)["a"]["c"].tolist() == [[1, 0], [0, 1]]


def test_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mat")
    with pytest.raises(DataError, match="a pipe or device, not a file"):
        read_matlab(tmp_path / "a.mat")
