"""Tests of chatreid_plugin.engine.parsers.matlab_files: sound files, and those that unpack to more than is wanted."""

import os
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from chatreid_plugin.engine.parsers import matlab_files
from chatreid_plugin.engine.parsers.matlab_files import read_matlab
from chatreid_plugin.errors import DataError


@pytest.mark.parametrize(("version", "packed"), [("4", False), ("5", False), ("5", True)])
def test_file_of_every_version_is_read(tmp_path: Path, version: str, packed: bool) -> None:
    savemat(tmp_path / "a.mat", {"labels": np.eye(3)}, format=version, do_compression=packed)
    assert read_matlab(tmp_path / "a.mat")["labels"].tolist() == np.eye(3).tolist()


def test_file_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matlab_files, "MOST_BYTES", 2**20)
    savemat(tmp_path / "a.mat", {"a": np.zeros(2**19, np.uint8), "b": np.zeros(2**18)}, do_compression=True)
    assert (tmp_path / "a.mat").stat().st_size < 10_000
    with pytest.raises(DataError, match=r"a\.mat unpacks to more than 1,048,576 bytes"):
        read_matlab(tmp_path / "a.mat")


def test_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mat")
    with pytest.raises(DataError, match="a pipe or device, not a file"):
        read_matlab(tmp_path / "a.mat")
