"""Tests of chatreid_plugin.datasets.cuhk03: extraction, protocols, damaged MATLAB files."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

from chatreid_plugin.config import SourceSettings
from chatreid_plugin.datasets import cuhk03
from chatreid_plugin.datasets.catalog import read_catalog
from chatreid_plugin.datasets.listing import Listing
from chatreid_plugin.datasets.registry import list_source
from chatreid_plugin.demo.layouts import LAYOUTS
from chatreid_plugin.demo.layouts.cuhk03 import TRIALS, write_cuhk03_classic
from chatreid_plugin.errors import ConfigError, DataError
from chatreid_plugin.pixels import save_image


MakeSource = Callable[..., SourceSettings]
ListCuhk03 = Callable[..., Listing]


@pytest.fixture(scope="session")
def shared_raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the raw files once; nothing in them may be changed."""
    return LAYOUTS["cuhk03:detected"](tmp_path_factory.mktemp("cuhk03") / "raw", 0).root


@pytest.fixture
def raw(shared_raw: Path, tmp_path: Path) -> Path:
    """Return a copy of the raw files that a test may damage."""
    return shutil.copytree(shared_raw, tmp_path / "my_cache_c3" / "cuhk03")


@pytest.fixture
def list_cuhk03(make_source: MakeSource, tmp_path: Path) -> ListCuhk03:
    """Return a function that lists the copy of the raw files."""

    def list_it(**changes: object) -> Listing:
        root = tmp_path / "my_cache_c3" / "cuhk03"
        return list_source(make_source(**({"name": "cuhk03", "parser": None, "root": root} | changes)))

    return list_it


def get_raw_file(raw: Path) -> Path:
    return raw / "cuhk03_release" / "cuhk-03.mat"


def get_configuration(raw: Path) -> Path:
    return raw / "cuhk03_new_protocol_config_detected.mat"


def test_images_are_those_of_the_file(list_cuhk03: ListCuhk03, raw: Path) -> None:
    list_cuhk03()
    with h5py.File(get_raw_file(raw)) as file:
        # Camera pair 2, person 1, image 6: the first of the second view, kept with reversed axes.
        people = file[file["detected"][0, 1]]
        expected = np.asarray(file[people[5, 0]]).transpose(2, 1, 0)
    with Image.open(raw / "images_detected" / "2_001_2_06.png") as image:
        assert np.array_equal(np.asarray(image), expected)


def test_detected_and_labeled_boxes_differ(list_cuhk03: ListCuhk03, raw: Path) -> None:
    detected = {crop.path.rpartition("/")[2] for crop in list_cuhk03(variant="detected").crops}
    labeled = {crop.path.rpartition("/")[2] for crop in list_cuhk03(variant="labeled").crops}
    assert labeled - detected == {"1_002_1_05.png"}
    assert detected < labeled


def test_images_are_extracted_once(
    list_cuhk03: ListCuhk03, raw: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = list_cuhk03()
    output = capsys.readouterr()
    assert "extract detected: 100%" in output.err and output.out == ""
    assert sorted(path.name for path in raw.iterdir() if path.name.startswith(".")) == []
    get_raw_file(raw).unlink()
    monkeypatch.setattr(cuhk03, "_read_images", lambda *rest: pytest.fail("extracted again"))
    assert list_cuhk03().crops == first.crops


def test_interrupted_extraction_leaves_nothing_behind(
    list_cuhk03: ListCuhk03, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {path.name for path in raw.iterdir()}

    def fill_the_disk(image: Image.Image, path: Path) -> None:
        if path.name == "2_001_1_01.png":
            raise OSError(28, "No space left on device")
        save_image(image, path)

    with monkeypatch.context() as patch:
        patch.setattr(cuhk03, "save_image", fill_the_disk)
        with pytest.raises(DataError, match=r"cannot be written to .*images_detected: .*No space left on device"):
            list_cuhk03()
    assert {path.name for path in raw.iterdir()} == names
    assert len(list_cuhk03().crops) == 35


def test_incomplete_folder_is_named(list_cuhk03: ListCuhk03, raw: Path) -> None:
    list_cuhk03()
    (raw / "images_detected" / "1_003_1_05.png").unlink()
    with pytest.raises(DataError, match=r"lacks 1 images .*first: 1_003_1_05\.png\)\. Delete the folder"):
        list_cuhk03()


def test_new_protocol_has_a_query_for_each_view(list_cuhk03: ListCuhk03, raw: Path) -> None:
    crops = list_cuhk03().crops
    queries = Counter((crop.person, crop.camera) for crop in crops if crop.split == "query")
    tested = ["1_003", "1_004", "2_002", "5_001"]
    assert queries == {(person, view): 1 for person in tested for view in "12"}
    assert {crop.person for crop in crops if crop.split == "gallery"} == set(tested)
    assert {crop.person for crop in crops if crop.split == "train"}.isdisjoint(tested)


def test_classic_trial_is_the_one_asked_for(list_cuhk03: ListCuhk03, raw: Path, tmp_path: Path) -> None:
    written = write_cuhk03_classic(tmp_path / "other", 0, "labeled", trial=20)
    listing = list_cuhk03(variant="labeled_classic", trial=20)
    found = {crop.path: (crop.split, f"cuhk03:{crop.person}") for crop in listing.crops}
    assert found == {record.path: (record.split, record.person_id) for record in written.records}
    assert {crop.person for crop in listing.crops if crop.split == "gallery"} == {"1_002", "2_001"}
    assert listing.protocol == {"query_is_gallery": True, "trial": 20}


def test_unknown_trial_is_a_configuration_error(list_cuhk03: ListCuhk03, raw: Path) -> None:
    with pytest.raises(ConfigError, match=rf"`trial: 21`: .*cuhk-03\.mat has the test sets 1 to {TRIALS}"):
        list_cuhk03(variant="detected_classic", trial=21)


@pytest.mark.parametrize("variant", ["detected", "detected_classic"])
def test_missing_raw_file_is_named(list_cuhk03: ListCuhk03, raw: Path, variant: str) -> None:
    get_raw_file(raw).unlink()
    with pytest.raises(DataError, match=r"holds no cuhk-03\.mat.*set `variant: detected_np`"):
        list_cuhk03(variant=variant)


def test_missing_configuration_is_named_before_anything_is_extracted(list_cuhk03: ListCuhk03, raw: Path) -> None:
    get_configuration(raw).unlink()
    with pytest.raises(DataError, match=r"holds no cuhk03_new_protocol_config_detected\.mat.*person-re-ranking"):
        list_cuhk03()
    assert not (raw / "images_detected").exists()


def test_files_may_lie_in_one_folder(list_cuhk03: ListCuhk03, raw: Path) -> None:
    get_configuration(raw).rename(raw / "cuhk03_release" / get_configuration(raw).name)
    assert len(list_cuhk03(root=raw / "cuhk03_release").crops) == 35
    assert len(list_cuhk03().crops) == 35


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("variant", ["detected", "detected_classic"])
def test_raw_file_cut_short_is_named(list_cuhk03: ListCuhk03, raw: Path, variant: str, share: float) -> None:
    path = get_raw_file(raw)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=r"cuhk-03\.mat is not the published cuhk-03\.mat.*Download it again"):
        list_cuhk03(variant=variant)
    assert not (raw / "images_detected").exists()


def test_raw_file_of_another_structure_is_named(list_cuhk03: ListCuhk03, raw: Path) -> None:
    with h5py.File(get_raw_file(raw), "w") as file:
        file.create_dataset("detected", data=np.zeros((1, 5)))
    for variant in ("detected", "labeled", "detected_classic"):
        with pytest.raises(DataError, match="is not the published"):
            list_cuhk03(variant=variant)


def write_secret_pixels(file: h5py.File, how: str, secret: Path) -> None:
    """Let the image that the cells name take its values from elsewhere, or promise 16 terabytes of them."""
    shape = (3, 4, secret.stat().st_size // 12)
    if how == "external storage":
        file.create_dataset("secret", shape, np.uint8, external=[(str(secret), 0, h5py.h5f.UNLIMITED)])
    elif how == "virtual data set":
        layout = h5py.VirtualLayout(shape, np.uint8)
        layout[:] = h5py.VirtualSource(str(secret), "secret", shape)
        file.create_virtual_dataset("secret", layout)
    else:
        file.create_dataset("secret", (3, 2**21, 2**21), np.uint8, chunks=(1, 64, 64))
    file["people"] = np.array([[file["secret"].ref]], h5py.ref_dtype)
    file["detected"] = np.array([[file["people"].ref]], h5py.ref_dtype)


@pytest.mark.parametrize("how", ["external storage", "virtual data set", "16 terabytes"])
def test_raw_file_reads_no_other_file_and_no_more_than_images(
    list_cuhk03: ListCuhk03, raw: Path, tmp_path: Path, how: str
) -> None:
    (tmp_path / "secret").write_bytes(b"root:x:0:0:root:/root:/bin/bash\n" * 9)
    with h5py.File(get_raw_file(raw), "w") as file:
        write_secret_pixels(file, how, tmp_path / "secret")
    with pytest.raises(DataError, match="(lie in another file|promises .* values), as in no published file"):
        list_cuhk03()
    assert not (raw / "images_detected").exists()


def test_raw_file_follows_no_link_to_another_file(list_cuhk03: ListCuhk03, raw: Path, tmp_path: Path) -> None:
    get_raw_file(raw).rename(tmp_path / "other.mat")
    with h5py.File(get_raw_file(raw), "w") as file:
        file["detected"] = h5py.ExternalLink(str(tmp_path / "other.mat"), "/detected")
    with pytest.raises(DataError, match="detected lies in another file, as in no published file"):
        list_cuhk03()


def test_one_image_named_a_million_times_is_refused(list_cuhk03: ListCuhk03, raw: Path) -> None:
    with h5py.File(get_raw_file(raw), "w") as file:
        file["image"] = np.zeros((3, 4, 2), np.uint8)
        cells = np.full((1000, 1000), file["image"].ref, h5py.ref_dtype)
        file["people"] = cells
        file["detected"] = np.array([[file["people"].ref]], h5py.ref_dtype)
    with pytest.raises(DataError, match="names 1,000,000 images, as in no published file"):
        list_cuhk03()


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_configuration_cut_short_is_named(list_cuhk03: ListCuhk03, raw: Path, share: float) -> None:
    path = get_configuration(raw)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=r"config_detected\.mat cannot be read as a MATLAB file .*Get the published"):
        list_cuhk03()


@pytest.mark.parametrize("index", [0, 1000])
def test_index_outside_the_list_is_named(list_cuhk03: ListCuhk03, raw: Path, index: int) -> None:
    content = {key: value for key, value in loadmat(get_configuration(raw)).items() if not key.startswith("_")}
    content["query_idx"][0] = index
    savemat(get_configuration(raw), content)
    with pytest.raises(DataError, match="is not a published configuration"):
        list_cuhk03()


def test_wrong_name_in_the_configuration_is_named(list_cuhk03: ListCuhk03, raw: Path) -> None:
    list_cuhk03()
    content = {key: value for key, value in loadmat(get_configuration(raw)).items() if not key.startswith("_")}
    content["filelist"][0, 0] = np.array(["6_001_1_01.png"])
    savemat(get_configuration(raw), content)
    (raw / "images_detected" / "6_001_1_01.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"names '6_001_1_01\.png', which is not of the form 1_001_1_01\.png"):
        list_cuhk03()


def test_leftovers_among_the_images_are_skipped(list_cuhk03: ListCuhk03, raw: Path) -> None:
    count = len(list_cuhk03(variant="detected_classic").crops)
    for name in ("Thumbs.db", "._1_001_1_01.png", "cover.png"):
        (raw / "images_detected" / name).write_bytes(b"")
    listing = list_cuhk03(variant="detected_classic")
    assert len(listing.crops) == count == 35
    assert listing.skipped == {"not an image file": 2, "name is not of the form 1_001_1_01.png": 1}


def test_np_folders_are_told_apart_by_their_name(list_cuhk03: ListCuhk03, tmp_path: Path) -> None:
    LAYOUTS["cuhk03:labeled_np"](tmp_path, 0)
    assert len(list_cuhk03(variant="labeled_np", root=tmp_path / "cuhk03-np").crops) == 36
    for root in (tmp_path, tmp_path / "cuhk03-np", tmp_path / "cuhk03-np" / "labeled"):
        with pytest.raises(DataError, match=r"lacks detected/bounding_box_train, .* of CUHK03-NP \(detected\)"):
            list_cuhk03(variant="detected_np", root=root)


def test_np_names_may_have_another_case_and_ending(list_cuhk03: ListCuhk03, tmp_path: Path) -> None:
    LAYOUTS["cuhk03:detected_np"](tmp_path, 0)
    folder = tmp_path / "cuhk03-np" / "detected" / "query"
    for name in ("0001_c2_77.PNG", "0001_c2_78.jpg", "0001_c3_79.png", "__MACOSX/._0001_c2_77.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    listing = list_cuhk03(variant="detected_np", root=tmp_path)
    added = {crop.path.rpartition("/")[2] for crop in listing.crops if crop.person == "0001" and crop.split == "query"}
    assert added == {"0001_c2_77.PNG", "0001_c2_78.jpg"}
    assert listing.skipped == {"name is not of the form 0003_c1_21.png": 1}


def test_missing_data_set_is_named(list_cuhk03: ListCuhk03, tmp_path: Path) -> None:
    for variant in ("detected", "detected_classic", "detected_np"):
        with pytest.raises(DataError, match=r"Data set folder .*nowhere does not exist"):
            list_cuhk03(variant=variant, root=tmp_path / "nowhere")


def test_published_counts_are_those_of_the_configurations() -> None:
    catalog = read_catalog()["cuhk03"].counts
    counts = {variant: {split: count.images for split, count in catalog[variant].items()} for variant in catalog}
    assert counts["detected"] == counts["detected_np"] == {"train": 7365, "query": 1400, "gallery": 5332}
    assert counts["labeled"] == counts["labeled_np"] == {"train": 7368, "query": 1400, "gallery": 5328}
