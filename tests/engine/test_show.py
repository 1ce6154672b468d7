"""Tests of chatreid_plugin.engine.show: any record is found, printed and drawn, in one file."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from chatreid_plugin.engine.show import (
    list_datasets,
    list_examples,
    read_records,
    render_json,
    render_page,
    render_text,
    write_page,
)
from chatreid_plugin.errors import DataError
from chatreid_plugin.records import Answer, Attribute, ImageReference, Instruction, Turn


WriteDataset = Callable[..., Path]
MakeImage = Callable[..., Path]
ParsePage = Callable[[str], Any]

CROP = ImageReference("a.jpg", 64, 128)


def make_gallery_record(number: int, **changes: Any) -> Instruction:
    values: dict[str, Any] = {
        "id": f"record-{number}",
        "task": "image_to_image_many_to_many",
        "images": (CROP, ImageReference("b.jpg", 64, 128), ImageReference("c.jpg"), CROP),
        "query_images": 1,
        "answer": Answer((0, 2)),
        "dataset": "own",
    }
    return Instruction(**(values | changes))


def make_caption_record(number: int, *captions: str) -> Instruction:
    return make_gallery_record(
        number, task="text_to_image_many_to_one", images=(CROP,), captions=captions, answer=Answer((1,))
    )


def test_records_in_the_middle_are_read_across_shards(write_dataset: WriteDataset) -> None:
    folder = write_dataset("own_set", [make_gallery_record(number) for number in range(10)], shard=4)
    (dataset,) = list_datasets(folder)
    assert (dataset.records, dataset.sizes) == (10, (4, 4, 2))
    assert [record.id for record in read_records(dataset, 3, 6)] == [f"record-{number}" for number in range(3, 9)]
    assert [record.id for record in read_records(dataset, 9, 5)] == ["record-9"]


def test_row_groups_that_are_not_asked_for_stay_unread(
    write_dataset: WriteDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_dataset("own_set", [make_gallery_record(number) for number in range(10)])
    path = folder / "own_set" / "00000.parquet"
    pq.write_table(pq.ParquetFile(path).read(), path, row_group_size=3)
    (dataset,) = list_datasets(folder)
    read: list[int] = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda file, group: read.append(group) or original(file, group)
    )
    assert [record.id for record in read_records(dataset, 5, 2)] == ["record-5", "record-6"]
    assert read == [1, 2]


@pytest.mark.parametrize("start", [-1, 10, 10**9])
def test_record_that_is_not_there_is_an_error(write_dataset: WriteDataset, start: int) -> None:
    folder = write_dataset("own_set", [make_gallery_record(number) for number in range(10)])
    with pytest.raises(DataError, match=r"own_set has no record number -?\d+: it has 10 \(0 to 9\)"):
        list_examples(folder, None, start, None)


def test_folder_without_data_sets_is_an_error(tmp_path: Path, write_dataset: WriteDataset) -> None:
    with pytest.raises(DataError, match=r"is no folder of built data sets: it has no dataset_info\.json"):
        list_datasets(tmp_path / "nowhere")
    folder = write_dataset("empty", [], recipe=False)
    with pytest.raises(DataError, match="holds no built data set"):
        list_datasets(folder)
    (folder / "dataset_info.json").write_text("[]")
    with pytest.raises(DataError, match="is not a JSON object"):
        list_datasets(folder)


def test_unknown_task_is_an_error_that_names_what_there_is(write_dataset: WriteDataset) -> None:
    folder = write_dataset("own_set", [make_gallery_record(0)])
    with pytest.raises(DataError, match="no data set or task 'standard_reid'; there are: own_set"):
        list_datasets(folder, "standard_reid")


def test_damaged_shard_is_an_error(write_dataset: WriteDataset) -> None:
    folder = write_dataset("own_set", [make_gallery_record(0)])
    path = folder / "own_set" / "00000.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="00000.parquet is not a readable Parquet file"):
        list_datasets(folder)


def test_one_example_of_each_task_or_three_of_the_one_named(write_dataset: WriteDataset) -> None:
    write_dataset("first", [make_gallery_record(number) for number in range(5)])
    folder = write_dataset("second", [make_caption_record(number, "x", "y") for number in range(5)])
    assert [(e.dataset, e.number) for e in list_examples(folder, None, 1, None)] == [("first", 1), ("second", 1)]
    assert [e.number for e in list_examples(folder, "text_to_image_many_to_one", 0, None)] == [0, 1, 2]
    assert [e.id for e in list_examples(folder, "first", 3, 10)] == ["record-3", "record-4"]


def test_example_says_which_images_are_right_and_what_they_cost(
    write_dataset: WriteDataset, make_image: MakeImage, tmp_path: Path
) -> None:
    make_image(tmp_path / "crops" / "a.jpg", (64, 128))
    (example,) = list_examples(write_dataset("own_set", [make_gallery_record(0)]), None, 0, None)
    assert [image.label for image in example.images] == ["query", "A", "B", "C"]
    assert [image.right for image in example.images] == [None, True, False, True]
    assert [image.found for image in example.images] == [True, False, False, True]
    # 64 x 128 is rounded to 56 x 140: 2 x 5 merged patches.
    assert [image.tokens for image in example.images] == [10, 10, None, 10]
    assert example.answer.startswith(("A, C match", "C, A match"))


def test_pair_is_first_and_second(write_dataset: WriteDataset) -> None:
    pair = make_gallery_record(
        0, task="image_to_image_one_to_one", images=(CROP, CROP), query_images=2, answer=Answer(match=True)
    )
    (example,) = list_examples(write_dataset("own_set", [pair]), None, 0, None)
    assert [(image.label, image.right) for image in example.images] == [("first", None), ("second", None)]
    assert example.answer == "Yes"


def test_text_is_wrapped_and_marks_right_and_missing_images(
    write_dataset: WriteDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    folder = write_dataset("own_set", [make_gallery_record(number) for number in range(3)])
    text = render_text(list_examples(folder, None, 2, None))
    lines = text.splitlines()
    assert lines[0] == "own_set, record 2 of 3"
    assert "        A      b.jpg (64 x 128, 10 tokens) ✓ FILE MISSING" in lines
    assert "        B      c.jpg (size unknown) FILE MISSING" in lines
    assert all(len(line) <= 60 for line in lines[lines.index("tokens  30 of 4 image(s) under Stage 2's policy") :])
    assert re.search("A, C match|C, A match", text)


def test_every_turn_of_a_dialogue_is_shown(write_dataset: WriteDataset, parse_page: ParsePage) -> None:
    record = make_gallery_record(
        0,
        task="dialogue_retrieval",
        query_images=0,
        attributes=(Attribute(-1, "hat", "cap"),),
        turns=(Turn((1, 2), 2, "A man in <b>red</b>."), Turn((1,), None, "", "bag", "backpack")),
    )
    examples = list_examples(write_dataset("own_set", [record]), None, 0, None)
    assert [turn.answer for turn in examples[0].turns] in (["B, C", "B"], ["C, B", "B"])
    lines = render_text(examples).splitlines()
    assert [line[:8].strip() for line in lines if line[0] != " "][-6:] == ["prompt", "answer"] * 3
    assert any("The person is C, also described as" in line for line in lines)
    (value,) = json.loads(render_json(examples))
    assert value["turns"][1]["answer"] == "B" and "bag: backpack" in value["turns"][1]["prompt"]
    text = render_page(examples)
    page = parse_page(text)
    assert "&lt;b&gt;red" in text and "Turn 3" in page.text and "bag: backpack" in page.text
    # The images' marks are those of the first answer.
    assert [len(page.find("figure", kind)) for kind in ("right", "wrong")] == [2, 2]


def test_json_is_a_list_of_examples(write_dataset: WriteDataset) -> None:
    folder = write_dataset("own_set", [make_caption_record(0, "one", "two")])
    (value,) = json.loads(render_json(list_examples(folder, None, 0, None)))
    assert value["captions"] == [{"text": "one", "right": False}, {"text": "two", "right": True}]
    assert value["images"][0]["path"] == "a.jpg"
    assert value["answer"] == "The second caption"


def test_page_holds_its_pictures_and_needs_nothing_from_elsewhere(
    write_dataset: WriteDataset, make_image: MakeImage, parse_page: ParsePage, tmp_path: Path
) -> None:
    make_image(tmp_path / "crops" / "a.jpg", (64, 128))
    make_image(tmp_path / "crops" / "b.jpg", (64, 128))
    write_dataset("first", [make_gallery_record(0)])
    folder = write_dataset("second", [make_caption_record(0, "one", "two")])
    write_page(tmp_path / "show.html", list_examples(folder, None, 0, None))
    text = (tmp_path / "show.html").read_text(encoding="utf-8")
    page = parse_page(text)
    assert page.open == []
    assert "http" not in text
    assert not page.find("link") and not page.find("script")
    assert len(page.find("img")) == 4
    assert all(image["src"].startswith("data:image/jpeg;base64,") and image["alt"] for image in page.find("img"))
    assert [len(page.find("figure", kind)) for kind in ("probe", "right", "wrong")] == [2, 2, 1]
    assert text.count('aria-label="right answer">✓') == 2
    # The query comes before the gallery, and a missing file is a box with its path.
    kinds = [values["class"] for values in page.find("figure")]
    assert kinds == ["probe", "right", "wrong", "right", "probe"]
    assert len(page.find("div", "missing")) == 1
    assert 'class="missing">c.jpg<' in text
    assert "two ✓" in page.text


def test_page_escapes_what_comes_from_outside(write_dataset: WriteDataset) -> None:
    record = make_gallery_record(
        0,
        task="text_to_image_one_to_one",
        images=(ImageReference('"><b>.jpg', 8, 8),),
        answer=Answer(match=False),
        captions=("<script>alert(1)</script>",),
        dataset="<i>own",
    )
    text = render_page(list_examples(write_dataset("own_set", [record]), None, 0, None))
    assert "&lt;script&gt;alert(1)" in text
    for raw in ("<script>", "<b>.jpg", "<i>own"):
        assert raw not in text
