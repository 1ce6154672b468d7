"""Tests of chatreid_plugin.datasets.attributes: MATLAB files that are wrong, trials, identities."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from scipy.io import loadmat, savemat

from chatreid_plugin.config import SourceSettings
from chatreid_plugin.datasets.registry import list_source
from chatreid_plugin.demo.layouts import LAYOUTS
from chatreid_plugin.errors import ConfigError, DataError


FILES = {
    "pa100k": "annotation.mat",
    "peta": "PETA.mat",
    "rapv1": "RAP_annotation/RAP_annotation.mat",
    "rapv2": "RAP_annotation/RAP_annotation.mat",
}
MakeSet = Callable[..., SourceSettings]


@pytest.fixture
def make_set(tmp_path: Path) -> MakeSet:
    """Return a function that writes a set and returns its source."""

    def make(name: str, **changes: Any) -> SourceSettings:
        LAYOUTS[name](tmp_path, 0)
        return SourceSettings.model_validate({"name": name, "root": tmp_path, "allow_count_mismatch": True} | changes)

    return make


def change_file(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Read a MATLAB file, change its variables and write it again."""
    values = {key: value for key, value in loadmat(path, simplify_cells=True).items() if not key.startswith("__")}
    change(values)
    savemat(path, values)


@pytest.mark.parametrize("name", FILES)
def test_file_that_is_no_matlab_file_is_named(make_set: MakeSet, name: str) -> None:
    source = make_set(name)
    (source.root / FILES[name]).write_text("<html>404</html>" * 20)
    with pytest.raises(DataError, match=r"\.mat cannot be read as a MATLAB file .*Get the published file again"):
        list_source(source)


def test_file_that_is_cut_short_is_named(make_set: MakeSet) -> None:
    source = make_set("peta")
    path = source.root / FILES["peta"]
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match=r"PETA\.mat cannot be read as a MATLAB file"):
        list_source(source)


def test_file_of_matlab_7_3_is_named(make_set: MakeSet) -> None:
    source = make_set("pa100k")
    path = source.root / FILES["pa100k"]
    path.unlink()
    with h5py.File(path, "w", userblock_size=512) as file:
        file["attributes"] = np.zeros(3)
    with path.open("r+b") as head:
        head.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM")
    with pytest.raises(DataError, match=r"annotation\.mat cannot be read as a MATLAB file \(version 5 to 7\)"):
        list_source(source)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pa100k", r"annotation\.mat has no 'attributes' \(found: other\)"),
        ("peta", r"PETA\.mat has no 'peta' \(found: other\)"),
        ("rapv1", r"RAP_annotation\.mat has no 'RAP_annotation' \(found: other\)"),
        ("rapv2", r"RAP_annotation\.mat has no 'RAP_annotation' \(found: other\)"),
    ],
)
def test_file_of_something_else_is_named(make_set: MakeSet, name: str, message: str) -> None:
    source = make_set(name)
    savemat(source.root / FILES[name], {"other": [1, 2]})
    with pytest.raises(DataError, match=message):
        list_source(source)


def test_structure_with_too_few_fields_is_refused(make_set: MakeSet) -> None:
    source = make_set("peta")
    savemat(source.root / FILES["peta"], {"peta": {"data": np.zeros((2, 3))}})
    with pytest.raises(DataError, match=r"'peta' is not a structure with 4 fields"):
        list_source(source)


@pytest.mark.parametrize(("read_as", "written", "other"), [("rapv1", "rapv2", "rapv2"), ("rapv2", "rapv1", "rapv1")])
def test_other_version_of_rap_is_named(make_set: MakeSet, read_as: str, written: str, other: str) -> None:
    source = make_set(written).model_copy(update={"name": read_as})
    with pytest.raises(DataError, match=rf"ead it with the parser {other}"):
        list_source(source)


def test_labels_of_another_size_are_refused(make_set: MakeSet) -> None:
    source = make_set("pa100k")
    change_file(source.root / FILES["pa100k"], lambda file: file.update(val_label=np.zeros((2, 26))))
    with pytest.raises(DataError, match=r"'val_label' has 2 rows and 26 columns for 3 images and 26 attributes"):
        list_source(source)


def test_split_with_an_unknown_image_is_refused(make_set: MakeSet) -> None:
    source = make_set("rapv2")

    def change(file: dict[str, Any]) -> None:
        file["RAP_annotation"]["partition_attribute"][0]["test_index"] = np.array([1, 99])

    change_file(source.root / FILES["rapv2"], change)
    with pytest.raises(DataError, match=r"the split names image 99 of 12"):
        list_source(source)


@pytest.mark.parametrize("name", ["peta", "rapv1", "rapv2"])
def test_trial_chooses_the_published_split(make_set: MakeSet, name: str) -> None:
    source = make_set(name)
    splits = [
        {crop.path: crop.split for crop in list_source(source.model_copy(update={"trial": trial})).crops}
        for trial in (1, 2, 5)
    ]
    assert splits[0].keys() == splits[1].keys() == splits[2].keys()
    assert splits[0] != splits[1]
    assert sorted(splits[0].values()) == sorted(splits[2].values())
    with pytest.raises(ConfigError, match=r"there is no trial 6; .* has 1 to 5"):
        list_source(source.model_copy(update={"trial": 6}))


def test_rapv2_unknown_people_are_apart(make_set: MakeSet) -> None:
    people = [crop.person for crop in list_source(make_set("rapv2")).crops]
    # Three people with a number in two images each, and six images of people without one.
    assert sorted(people.count(person) for person in set(people)) == [1] * 6 + [2] * 3
    assert {person for person in people if people.count(person) == 2} == {"1", "2", "3"}


def test_rap_image_with_another_name_is_a_camera_of_its_own(make_set: MakeSet) -> None:
    source = make_set("rapv1")
    images = sorted((source.root / "RAP_dataset").iterdir())
    images[0].rename(images[0].with_name("first.png"))

    def change(file: dict[str, Any]) -> None:
        names = file["RAP_annotation"]["imagesname"]
        names[list(names).index(images[0].name)] = "first.png"

    change_file(source.root / FILES["rapv1"], change)
    cameras = {crop.path: crop.camera for crop in list_source(source).crops}
    assert cameras.pop("RAP_dataset/first.png") == "RAP_dataset/first.png"
    assert set(cameras.values()) == {"01", "02"}
