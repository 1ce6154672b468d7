"""SYNTH-PEDES, LUPerson-MLLM and MALS: captions and attributes; leftovers are counted, wrong files are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from chatreid_plugin.config import SourceSettings
from chatreid_plugin.datasets.listing import Listing
from chatreid_plugin.datasets.registry import list_datasets
from chatreid_plugin.errors import DataError


CAPTION_FILES = ("Ts-qwen", "Td-qwen", "Ts-shikra", "Td-shikra")


def list_crops(root: Path, name: str) -> Listing:
    return list_datasets()[name].list_images(SourceSettings(name=name, root=root))


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def touch(root: Path, *paths: str) -> None:
    """Make empty files: no parser opens an image."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def make_synthpedes(root: Path, **changes: Any) -> Path:
    record = {
        "id": 7,
        "file_path": "Part1/7/1.jpg",
        "attributes": ["man,black hair,black shirt,pink shorts,black shoes,unknown"],
        "captions": ["A man walks.", "He runs."],
        "prompt_caption": ["A man with black hair."],
    }
    write(root / "synthpedes_dataset.json", [record | changes])
    touch(root, "Part1/7/1.jpg")
    return root


def make_mals(root: Path, **changes: Any) -> Path:
    image = "gene_crop/c_g_a_0/0.jpg"
    record = {"image": image, "caption": "a young boy", "image_id": "c_g_a_0_0", "label": [1] * 27}
    write(root / "gene_attrs" / "g_c_g_a_0_attrs.json", [record | changes])
    touch(root, image)
    return root


def make_luperson(root: Path, **captions: Any) -> Path:
    for name in CAPTION_FILES:
        write(root / "caption" / f"{name}.json", captions.get(name.replace("-", "_"), {"a/b/1.jpg": f"{name} says."}))
    touch(root, "LUPerson-MLLM/1.jpg")
    return root


def test_synthpedes_reads_attributes_and_leaves_out_the_unknown(tmp_path: Path) -> None:
    (crop,) = list_crops(make_synthpedes(tmp_path), "synthpedes").crops
    assert (crop.split, crop.person, crop.camera) == ("train", "7", "Part1/7/1.jpg")
    assert crop.captions == ("A man walks.", "He runs.")
    assert crop.attributes == {
        "gender": "man",
        "hair": "black hair",
        "upper_clothes": "black shirt",
        "lower_clothes": "pink shorts",
        "shoes": "black shoes",
    }


@pytest.mark.parametrize("attributes", [[], ["man,black hair"], ["a,b,c,d,e,f,g"]])
def test_synthpedes_counts_attributes_that_are_not_six(tmp_path: Path, attributes: list[str]) -> None:
    listing = list_crops(make_synthpedes(tmp_path, attributes=attributes), "synthpedes")
    assert listing.crops[0].attributes == {}
    assert listing.skipped == {"attributes that are not six values": 1}


def test_synthpedes_refuses_wrong_records_and_missing_images(tmp_path: Path) -> None:
    make_synthpedes(tmp_path, captions=None)
    with pytest.raises(DataError, match=r"synthpedes_dataset\.json, record 1: `captions` must be a list of texts"):
        list_crops(tmp_path, "synthpedes")
    make_synthpedes(tmp_path, file_path="Part11/7/1.jpg")
    with pytest.raises(DataError, match=r"1 of 1 images .* 1 in Part11/7 .* Unpack"):
        list_crops(tmp_path, "synthpedes")
    (tmp_path / "synthpedes_dataset.json").unlink()
    with pytest.raises(DataError, match=r"lacks synthpedes_dataset\.json of SYNTH-PEDES"):
        list_crops(tmp_path, "synthpedes")


def test_synthpedes_refuses_an_image_named_twice(tmp_path: Path) -> None:
    make_synthpedes(tmp_path)
    path = tmp_path / "synthpedes_dataset.json"
    write(path, json.loads(path.read_text()) * 2)
    with pytest.raises(DataError, match=r"name Part1/7/1\.jpg 2 times"):
        list_crops(tmp_path, "synthpedes")


def test_luperson_joins_the_four_caption_files(tmp_path: Path) -> None:
    (crop,) = list_crops(make_luperson(tmp_path), "lupersonmllm").crops
    assert (crop.path, crop.person, crop.camera) == ("LUPerson-MLLM/1.jpg", "1", "LUPerson-MLLM/1.jpg")
    assert crop.captions == tuple(f"{name} says." for name in CAPTION_FILES)


def test_luperson_drops_and_counts_what_the_prompt_left(tmp_path: Path) -> None:
    wrong = {
        "Ts_qwen": {"1.jpg": "[description] of a man"},
        "Td_shikra": {"1.jpg": "A <b>man"},
        "Td_qwen": {"1.jpg": " "},
    }
    listing = list_crops(make_luperson(tmp_path, **wrong), "lupersonmllm")
    assert listing.crops[0].captions == ("Ts-shikra says.",)
    assert listing.skipped == {"caption with leftovers of its prompt": 2, "empty caption": 1}


def test_luperson_refuses_missing_and_wrong_caption_files(tmp_path: Path) -> None:
    make_luperson(tmp_path, Td_qwen=["A man."])
    with pytest.raises(DataError, match=r"Td-qwen\.json must hold an object from image path to caption"):
        list_crops(tmp_path, "lupersonmllm")
    make_luperson(tmp_path, Td_qwen={"1.jpg": ["A man."]})
    with pytest.raises(DataError, match=r"Td-qwen\.json, '1\.jpg': expected a caption, found a list"):
        list_crops(tmp_path, "lupersonmllm")
    (tmp_path / "caption" / "Td-qwen.json").unlink()
    with pytest.raises(DataError, match=r"lacks caption/Td-qwen\.json of LUPerson-MLLM"):
        list_crops(tmp_path, "lupersonmllm")


def test_luperson_counts_missing_images(tmp_path: Path) -> None:
    make_luperson(tmp_path, Td_qwen={"2.jpg": "A man."})
    with pytest.raises(DataError, match=r"1 of 2 images .* \(first: LUPerson-MLLM/2\.jpg\)"):
        list_crops(tmp_path, "lupersonmllm")


def test_mals_labels_become_words(tmp_path: Path) -> None:
    # Woman, age unknown, short hair, hat, no bags; short sleeves, long trousers; white and red above, unknown below.
    labels = [0, -1, 0, 0, 1, 1, -1, 1, 0, 1] + [1, 0, 0, 1, 1, 1, 1, 1] + [-1] * 9
    (crop,) = list_crops(make_mals(tmp_path, label=labels), "mals").crops
    assert (crop.person, crop.camera, crop.captions) == ("c_g_a_0_0", "gene_crop/c_g_a_0/0.jpg", ("a young boy",))
    assert crop.attributes == {
        "gender": "female",
        "hair_length": "short",
        "hat": "yes",
        "backpack": "no",
        "handbag": "no",
        "sleeves": "short",
        "lower_length": "long",
        "lower_type": "trousers or shorts",
        "upper_colour": "white and red",
    }


def test_mals_last_label_is_brown_below(tmp_path: Path) -> None:
    (crop,) = list_crops(make_mals(tmp_path, label=[-1] * 17 + [0] + [-1] * 8 + [0]), "mals").crops
    assert crop.attributes == {"upper_colour": "grey", "lower_colour": "brown"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": [1] * 26}, "`label` must be a list of 27 numbers"),
        ({"label": "1"}, "`label` must be a list of 27 numbers"),
        ({"label": [2] * 27}, "`label` must hold 0, 1 and -1 only"),
        ({"label": [1.0] * 27}, "`label` must hold 0, 1 and -1 only"),
        ({"image_id": None}, "`image_id` must be"),
        ({"image": "../0.jpg"}, "does not lie below the data set folder"),
    ],
)
def test_mals_refuses_wrong_records(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    make_mals(tmp_path, **changes)
    with pytest.raises(DataError, match=rf"g_c_g_a_0_attrs\.json, record 1: .*{message}"):
        list_crops(tmp_path, "mals")


def test_mals_refuses_a_folder_without_labels(tmp_path: Path) -> None:
    make_mals(tmp_path)
    (tmp_path / "gene_attrs" / "g_c_g_a_0_attrs.json").rename(tmp_path / "gene_attrs" / "._attrs.json")
    with pytest.raises(DataError, match="gene_attrs holds no JSON file"):
        list_crops(tmp_path, "mals")
