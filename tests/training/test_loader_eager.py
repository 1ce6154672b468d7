"""The eager mode's columns: written-down types, and what is left to stock LLaMA-Factory."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import List, Value
from PIL import Image

from chatreid_plugin.errors import DataError
from chatreid_plugin.training.loader import IMAGE, make_token_features


@pytest.fixture
def write_stock(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that writes a data set of LLaMA-Factory's own format and returns the keys that name it."""

    def write(rows: list[dict[str, Any]], **columns: str) -> dict[str, Any]:
        (tmp_path / "stock.json").write_text(json.dumps(rows))
        names = {"messages": "messages", **columns}
        entry = {"file_name": "stock.json", "formatting": "sharegpt", "columns": names}
        (tmp_path / "dataset_info.json").write_text(json.dumps({"stock": entry}))
        return {"dataset": "stock", "dataset_dir": str(tmp_path), "chatreid_lazy": False}

    return write


def make_row(question: str, **media: Any) -> dict[str, Any]:
    return {"messages": [{"from": "human", "value": question}, {"from": "gpt", "value": "Yes"}], **media}


def test_types_of_tokens_are_narrow_and_survive_in_a_tokenized_path(
    load_rows: Callable[..., Any], tmp_path: Path
) -> None:
    expected = make_token_features(packing=False, neat_packing=False)
    assert expected["input_ids"] == expected["labels"] == List(Value("int32"))
    assert expected["attention_mask"] == List(Value("int8")) and expected["images"] == List(IMAGE)
    for _ in range(2):
        rows = load_rows(1, chatreid_lazy=False, tokenized_path=str(tmp_path / "tokens"))
        assert rows.features == expected


def test_types_of_packs_hold_what_the_collator_reads(load_rows: Callable[..., Any]) -> None:
    packed = load_rows(1, chatreid_lazy=False, neat_packing=True, cutoff_len=1024)
    assert packed.features == make_token_features(packing=True, neat_packing=True)
    parameters = packed[0]["packing_params"]
    assert len(parameters["image_subseq_ids"]) == len(packed[0]["images"])
    assert parameters["sequence_boundaries"][-1] == len(packed[0]["input_ids"]) == 1024
    plain = load_rows(1, chatreid_lazy=False, packing=True, cutoff_len=1024)
    assert plain.features == make_token_features(packing=True, neat_packing=False)


def test_predictions_are_typed_too(parse: Callable[..., Any], tokenizer_module: dict[str, Any]) -> None:
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer

    for lazy in (True, False):
        parsed = parse(1, val_size=0.25, chatreid_lazy=lazy)
        parsed.training.predict_with_generate = True  # parsing it demands packages for the metrics
        template = get_template_and_fix_tokenizer(tokenizer_module["tokenizer"], parsed.data)
        module = get_dataset(template, parsed.model, parsed.data, parsed.training, stage="sft", **tokenizer_module)
        assert module["eval_dataset"].features == make_token_features(packing=False, neat_packing=False)


def test_stock_image_paths_are_counted_from_the_header(
    load_rows: Callable[..., Any], write_stock: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    Image.new("RGB", (56, 112)).save(tmp_path / "a.jpg")
    keys = write_stock([make_row("<image>Is it?", images=["a.jpg"])], images="images")
    (row,) = load_rows(3, **keys)
    assert row["images"] == [{"path": str(tmp_path / "a.jpg"), "width": 0, "height": 0, "record": "", "task": ""}]


def test_videos_are_left_to_stock(
    load_rows: Callable[..., Any], write_stock: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    for name in "ab":
        Image.new("RGB", (56, 112)).save(tmp_path / f"{name}.jpg")
    keys = write_stock([make_row("<video>Is it?", videos=[["a.jpg", "b.jpg"]])], videos="videos")
    (row,) = load_rows(3, **keys)
    assert row["videos"] == [[str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg")]]


def test_data_without_a_usable_row_is_one_error(
    load_rows: Callable[..., Any], write_stock: Callable[..., dict[str, Any]]
) -> None:
    keys = write_stock([{"messages": [{"from": "human", "value": "Alone"}]}])
    with pytest.raises(DataError, match="No record is left after tokenization"):
        load_rows(3, **keys)
