"""SYSU-MM01, RegDB and LLCM: lists, trials and modalities; leftovers are skipped, wrong lists are refused."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from chatreid_plugin.config import SourceSettings
from chatreid_plugin.datasets.listing import Listing
from chatreid_plugin.datasets.registry import list_datasets
from chatreid_plugin.demo.layouts.infrared import split_regdb, write_llcm, write_regdb, write_sysumm01
from chatreid_plugin.errors import ConfigError, DataError


WRITERS = {"sysumm01": write_sysumm01, "regdb": write_regdb, "llcm": write_llcm}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the three layouts once; nothing in them may be changed."""
    root = tmp_path_factory.mktemp("infrared")
    for name, write in WRITERS.items():
        write(root / name, 0)
    return root


@pytest.fixture
def sysu(layouts: Path, tmp_path: Path) -> Path:
    """Return a copy of SYSU-MM01, below folders that look like its own."""
    return shutil.copytree(layouts / "sysumm01", tmp_path / "cam3" / "0001" / "sysumm01")


@pytest.fixture
def regdb(layouts: Path, tmp_path: Path) -> Path:
    return shutil.copytree(layouts / "regdb", tmp_path / "Thermal" / "7" / "regdb")


@pytest.fixture
def llcm(layouts: Path, tmp_path: Path) -> Path:
    return shutil.copytree(layouts / "llcm", tmp_path / "cam3" / "llcm")


def list_crops(root: Path, **changes: Any) -> Listing:
    return list_datasets()[root.name].list_images(SourceSettings(name=root.name, root=root, **changes))


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_sysu_skips_leftovers_and_reads_upper_case_names(sysu: Path) -> None:
    expected = list_crops(sysu)
    (sysu / "__MACOSX" / "cam1" / "0005").mkdir(parents=True)
    (sysu / "cam1" / "__MACOSX" / "0005").mkdir(parents=True)
    folder = sysu / "cam1" / "0005"
    for leftover in (sysu / "cam1" / "__MACOSX" / "0005" / "0001.jpg", folder / "._0001.jpg", folder / "Thumbs.db"):
        leftover.touch()
    shutil.copy(folder / "0001.jpg", folder / "0001 (copy).jpg")
    (folder / "0002.jpg").rename(folder / "0002.JPG")
    listing = list_crops(sysu)
    assert [crop.path.lower() for crop in listing.crops] == [crop.path for crop in expected.crops]
    assert [(crop.person, crop.camera) for crop in listing.crops] == [(c.person, c.camera) for c in expected.crops]
    assert listing.skipped["not an image file"] == 2
    assert listing.skipped["name is not of the form cam1/0001/0001.jpg"] == 1


def test_sysu_splits_by_camera_and_lists(sysu: Path) -> None:
    crops = list_crops(sysu).crops
    assert {crop.person for crop in crops if crop.split == "train"} == {"0001", "0002", "0003", "0004"}
    assert {crop.camera for crop in crops if crop.split == "query"} == {"3", "6"}
    assert {crop.camera for crop in crops if crop.split == "gallery"} == {"1", "2", "4", "5"}
    assert {crop.camera for crop in crops if crop.modality == "infrared"} == {"3", "6"}


def test_sysu_reads_matlab_lists_when_text_is_missing(sysu: Path) -> None:
    expected = list_crops(sysu).crops
    for path in (sysu / "exp").glob("*.txt"):
        path.unlink()
    assert list_crops(sysu).crops == expected


def test_sysu_trials_take_the_first_ten_of_the_permutation(sysu: Path) -> None:
    path = sysu / "rand_perm_cam.mat"
    cells = loadmat(str(path))["rand_perm_cam"]
    rows = np.stack([np.roll(np.arange(12, 0, -1), trial) for trial in range(10)]).astype(np.uint8)
    cells[0, 0][4, 0] = rows
    savemat(str(path), {"rand_perm_cam": cells})
    trials = list_crops(sysu).protocol["trials"]
    assert len(trials) == 10
    groups = [next(group for group in trial["paths"] if group[0].startswith("cam1/0005/")) for trial in trials]
    assert groups[0] == [f"cam1/0005/{number:04d}.jpg" for number in range(12, 2, -1)]
    assert [group[0][-8:-4] for group in groups[:4]] == ["0012", "0001", "0002", "0003"]
    # Two identities were seen by four visible cameras, one by the two outdoors.
    assert {len(trial["paths"]) for trial in trials} == {10}


@pytest.mark.parametrize("folder", ["exp", ".."])
def test_sysu_finds_permutations_beside_the_root_and_in_exp(sysu: Path, folder: str) -> None:
    expected = list_crops(sysu).protocol
    (sysu / "rand_perm_cam.mat").rename(sysu / folder / "rand_perm_cam.mat")
    assert list_crops(sysu).protocol == expected


def test_sysu_warns_when_permutations_are_missing(sysu: Path) -> None:
    (sysu / "rand_perm_cam.mat").unlink()
    listing = list_crops(sysu)
    assert "trials" not in listing.protocol
    (warning,) = listing.warnings
    assert "wuancong/SYSU-MM01" in warning and "seeded draws" in warning


def test_sysu_refuses_permutations_of_other_images(sysu: Path) -> None:
    (sysu / "cam1" / "0005" / "0003.jpg").unlink()
    with pytest.raises(
        DataError, match=r"has 10 permutations of 12 images of identity 0005, camera 1; expected 10 of the 11 .* move"
    ):
        list_crops(sysu)


def test_sysu_refuses_permutations_without_an_identity(sysu: Path) -> None:
    savemat(str(sysu / "rand_perm_cam.mat"), {"rand_perm_cam": np.empty((0, 1), dtype=object)})
    with pytest.raises(DataError, match="no permutations of identity 0005, camera 1"):
        list_crops(sysu)


@pytest.mark.parametrize("length", [0, 100, 300, 3000])
def test_sysu_refuses_a_matlab_file_that_is_cut_short(sysu: Path, length: int) -> None:
    path = sysu / "rand_perm_cam.mat"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match=r"rand_perm_cam\.mat cannot be read as a MATLAB file"):
        list_crops(sysu)


def test_sysu_refuses_missing_and_wrong_lists(sysu: Path) -> None:
    (sysu / "exp" / "val_id.txt").write_text("four\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"val_id\.txt, line 1: 'four' is no identity"):
        list_crops(sysu)
    for name in ("val_id.txt", "val_id.mat"):
        (sysu / "exp" / name).unlink()
    with pytest.raises(DataError, match=r"val_id\.txt is missing"):
        list_crops(sysu)


def test_sysu_refuses_an_identity_in_two_lists(sysu: Path) -> None:
    (sysu / "exp" / "val_id.txt").write_text("4,5\n", encoding="utf-8")
    with pytest.raises(DataError, match="identity 5 is both in test_id and in train_id or val_id"):
        list_crops(sysu)


def test_sysu_names_a_missing_camera(sysu: Path) -> None:
    shutil.rmtree(sysu / "cam4")
    with pytest.raises(DataError, match="lacks cam4 of SYSU-MM01"):
        list_crops(sysu)


@pytest.mark.parametrize("trial", [1, 2, 10])
def test_regdb_reads_the_chosen_trial(regdb: Path, trial: int) -> None:
    listing = list_crops(regdb, trial=trial)
    trained, tested = split_regdb(trial)
    assert {crop.person for crop in listing.crops if crop.split == "train"} == {str(person) for person in trained}
    assert {crop.person for crop in listing.crops if crop.split != "train"} == {str(person) for person in tested}
    assert {crop.modality for crop in listing.crops if crop.split == "query"} == {"visible"}
    assert {crop.camera for crop in listing.crops if crop.split == "gallery"} == {"thermal"}
    assert listing.protocol == {"trial": trial}


def test_regdb_refuses_an_eleventh_trial(regdb: Path) -> None:
    with pytest.raises(ConfigError, match="trials 1 to 10, not 11"):
        list_crops(regdb, trial=11)


def test_regdb_names_a_missing_list(regdb: Path) -> None:
    (regdb / "idx" / "test_thermal_3.txt").unlink()
    assert list_crops(regdb).crops
    with pytest.raises(DataError, match=r"test_thermal_3\.txt is missing"):
        list_crops(regdb, trial=3)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (" 0\n", "\n", r"train_visible_1\.txt, line 1: .* is not of the form"),
        (" 0\n", " zero\n", "line 1: .* is not of the form"),
        ("Visible/", "cam1/", "line 1: .* is not of the form"),
        ("Visible/", "Thermal/", "line 1: Thermal/.* stands in a list of visible images"),
        (" 0\n", " 1\n", "line 2: identity 1 has label 0, but elsewhere in this split label 0 is"),
    ],
)
def test_regdb_refuses_a_wrong_line(regdb: Path, old: str, new: str, message: str) -> None:
    edit(regdb / "idx" / "train_visible_1.txt", old, new)
    with pytest.raises(DataError, match=message):
        list_crops(regdb)


def test_regdb_refuses_labels_that_differ_between_modalities(regdb: Path) -> None:
    path = regdb / "idx" / "train_thermal_1.txt"
    path.write_text(path.read_text().replace(" 0", " x").replace(" 1", " 0").replace(" x", " 1"), encoding="utf-8")
    with pytest.raises(DataError, match=r"train_thermal_1\.txt, line 1: identity 1 has label 1, but elsewhere"):
        list_crops(regdb)


def test_regdb_refuses_images_named_twice(regdb: Path) -> None:
    path = regdb / "idx" / "train_visible_1.txt"
    path.write_text(path.read_text() * 2, encoding="utf-8")
    with pytest.raises(DataError, match=r"name Visible/1/\S+ 2 times"):
        list_crops(regdb)


def test_regdb_refuses_an_identity_that_is_trained_and_tested(regdb: Path) -> None:
    path = regdb / "idx" / "train_visible_1.txt"
    *kept, moved = path.read_text().splitlines(keepends=True)
    path.write_text("".join(kept), encoding="utf-8")
    with (regdb / "idx" / "test_visible_1.txt").open("a", encoding="utf-8") as lines:
        lines.write(moved.replace(" 1", " 2"))
    with pytest.raises(DataError, match=r"1 identities are both .* \(first: 103\)"):
        list_crops(regdb)


def test_regdb_counts_missing_images_by_folder(regdb: Path) -> None:
    for path in (regdb / "Visible" / "285").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="2 of 16 images .* 2 in Visible/285"):
        list_crops(regdb)


def test_llcm_reads_lists_and_test_folders(llcm: Path) -> None:
    crops = list_crops(llcm).crops
    assert {crop.camera for crop in crops if crop.split == "train"} == {"1", "2", "3", "4"}
    assert {crop.person for crop in crops if crop.split == "train"} == {"0001", "0002", "0005"}
    assert {crop.modality for crop in crops if crop.split == "query"} == {"infrared"}
    assert {crop.camera for crop in crops if crop.split == "query"} == {"1", "2", "4"}
    assert {crop.camera for crop in crops if crop.split == "gallery"} == {"1", "2", "3"}


def test_llcm_skips_unlisted_identities_and_leftovers(llcm: Path) -> None:
    expected = list_crops(llcm).crops
    folder = llcm / "test_vis" / "cam1" / "0099"
    folder.mkdir()
    for name in ("0099_c01_s000001_f0001_vis.jpg", "._0099_c01_s000001_f0001_vis.jpg", "Thumbs.db"):
        (folder / name).touch()
    listing = list_crops(llcm)
    assert listing.crops == expected
    assert listing.skipped == {"identity not in test_id.txt": 1, "not an image file": 2}


def test_llcm_refuses_a_wrong_line_and_a_missing_list(llcm: Path) -> None:
    edit(llcm / "idx" / "train_nir.txt", "/0001_c01", "/0002_c01")
    with pytest.raises(DataError, match=r"train_nir\.txt, line 1: .* is not of the form"):
        list_crops(llcm)
    edit(llcm / "idx" / "train_nir.txt", "nir/", "nir/../../nir/")
    with pytest.raises(DataError, match=r"train_nir\.txt, line 1: .* is not of the form"):
        list_crops(llcm)
    (llcm / "idx" / "train_nir.txt").unlink()
    with pytest.raises(DataError, match=r"train_nir\.txt is missing"):
        list_crops(llcm)


def test_llcm_refuses_a_wrong_test_list(llcm: Path) -> None:
    (llcm / "idx" / "test_id.txt").write_text("3;4\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"test_id\.txt, line 1: '3;4' is no identity"):
        list_crops(llcm)


def test_llcm_refuses_an_identity_that_is_trained_and_tested(llcm: Path) -> None:
    shutil.copytree(llcm / "vis" / "0001", llcm / "test_vis" / "cam1" / "0001")
    (llcm / "idx" / "test_id.txt").write_text("1,3,4\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"1 identities are both .* \(first: 0001\)"):
        list_crops(llcm)
