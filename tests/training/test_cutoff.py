"""The cutoff guard through LLaMA-Factory's own get_dataset, against records built without the images left out."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from chatreid_plugin.errors import ConfigError, DataError
from chatreid_plugin.records import Answer, Attribute, ImageReference, Instruction
from chatreid_plugin.training.cutoff import drop_distractor


# Sizes differ, so that an image left out changes the run of its image tokens.
IMAGES = tuple(ImageReference(f"{n}.jpg", 56 + 14 * (n % 3), 112 + 28 * (n % 4)) for n in range(9))
LONG = Instruction("long-1", "standard_reid", IMAGES, 1, Answer(indices=(2, 6)), dataset="tiny")
SHORT = replace(LONG, id="short-1", images=IMAGES[:3], answer=Answer(indices=(1,)))
PAIR = Instruction("pair-1", "image_to_image_one_to_one", IMAGES[:2], 1, Answer(match=True), dataset="tiny")
# What is left when the last distractors, gallery images 7, 5 and 4, are left out; match 6 becomes the fifth, E.
TRIMMED = replace(LONG, images=tuple(IMAGES[n] for n in (0, 1, 2, 3, 4, 7)), answer=Answer(indices=(2, 4)))
UNCUT = 4096


def list_image_runs(row: Any, tokenizer: Any) -> list[int]:
    """Return the lengths of the runs of image tokens."""
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return [len(list(run)) for token, run in groupby(row["input_ids"]) if token == image]


@pytest.mark.parametrize("lazy", [True, False])
def test_trimmed_record_is_the_record_without_the_images(
    load_records: Callable[..., Any], tokenizer_module: dict[str, Any], lazy: bool
) -> None:
    wanted, short, full = load_records(TRIMMED, SHORT, LONG, cutoff_len=UNCUT)
    length = len(wanted["input_ids"])
    assert len(short["input_ids"]) < length < len(full["input_ids"])
    found, other = load_records(LONG, SHORT, cutoff_len=length, chatreid_lazy=lazy)
    assert found["input_ids"] == wanted["input_ids"] and found["labels"] == wanted["labels"]
    assert found["attention_mask"] == [1] * length
    names = [Path(image["path"]).name for image in found["images"]]
    assert names == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg", "7.jpg"]
    assert {image["record"] for image in found["images"]} == {"long-1"}
    assert other["input_ids"] == short["input_ids"]
    answer = tokenizer_module["tokenizer"].decode([token for token in found["labels"] if token >= 0])
    assert answer.replace(" ,", ",").startswith(("C, E", "E, C"))
    full_runs = list_image_runs(full, tokenizer_module["tokenizer"])
    assert len(full_runs) == 9
    assert list_image_runs(found, tokenizer_module["tokenizer"]) == [full_runs[n] for n in (0, 1, 2, 3, 4, 7)]


def test_one_token_less_costs_one_more_image_and_the_exact_length_none(load_records: Callable[..., Any]) -> None:
    (full,) = load_records(LONG, cutoff_len=UNCUT)
    length = len(full["input_ids"])
    (same,) = load_records(LONG, cutoff_len=length)
    (less,) = load_records(LONG, cutoff_len=length - 1)
    assert same["input_ids"] == full["input_ids"]
    assert [Path(i["path"]).name for i in less["images"]] == [f"{n}.jpg" for n in range(8)]


@pytest.mark.parametrize("lazy", [True, False])
def test_long_record_is_refused_as_configured(load_records: Callable[..., Any], lazy: bool) -> None:
    (full,) = load_records(LONG, cutoff_len=UNCUT)
    length = len(full["input_ids"])
    message = (
        f"Record long-1 needs {length} tokens, but cutoff_len is {length - 1} and chatreid_over_cutoff is raise. "
        f"Set cutoff_len: {length} or more, or a smaller image_max_pixels, or chatreid_over_cutoff: trim"
    )
    with pytest.raises(DataError, match=message):
        load_records(LONG, cutoff_len=length - 1, chatreid_over_cutoff="raise", chatreid_lazy=lazy)
    assert len(load_records(LONG, cutoff_len=length, chatreid_over_cutoff="raise", chatreid_lazy=lazy)) == 1


@pytest.mark.parametrize("lazy", [True, False])
def test_record_that_cannot_be_trimmed_is_an_error(load_records: Callable[..., Any], lazy: bool) -> None:
    message = r"Record pair-1 needs \d+ tokens, but cutoff_len is 40, and it has no gallery images"
    with pytest.raises(DataError, match=message):
        load_records(PAIR, cutoff_len=40, chatreid_lazy=lazy)


def test_matches_and_one_other_image_stay_even_if_the_record_is_then_refused(load_records: Callable[..., Any]) -> None:
    smallest = replace(LONG, images=tuple(IMAGES[n] for n in (0, 1, 3, 7)), answer=Answer(indices=(1, 2)))
    (row,) = load_records(smallest, cutoff_len=UNCUT)
    length = len(row["input_ids"])
    (trimmed,) = load_records(LONG, cutoff_len=length)
    assert trimmed["input_ids"] == row["input_ids"]
    with pytest.raises(DataError, match=f"needs {length} tokens, .*even after 5 gallery image"):
        load_records(LONG, cutoff_len=length - 1)


def test_wrong_value_of_the_key(load_records: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="chatreid_over_cutoff must be trim or raise, not 'cut'"):
        load_records(SHORT, chatreid_over_cutoff="cut")
    with pytest.raises(ConfigError, match="thin is now called trim; write chatreid_over_cutoff: trim"):
        load_records(SHORT, chatreid_over_cutoff="thin")


def test_attributes_follow_their_images() -> None:
    attributes = tuple(Attribute(n, "hat", f"kind {n}") for n in (-1, 0, 3, 6, 8))
    record = replace(LONG, answer=Answer(indices=(2, 7)), attributes=attributes)
    trimmed, position = drop_distractor(record) or (record, -1)
    assert position == 7
    assert trimmed.answer.indices == (2, 6)
    assert [(a.image, a.value) for a in trimmed.attributes] == [
        (-1, "kind -1"),
        (0, "kind 0"),
        (3, "kind 3"),
        (6, "kind 6"),
        (7, "kind 8"),
    ]
    dropped = [Attribute(7, "hat", "none")]
    assert (drop_distractor(replace(record, attributes=tuple(dropped))) or (record, 0))[0].attributes == ()


def test_packed_records_are_trimmed_and_not_cut(
    load_records: Callable[..., Any], tokenizer_module: dict[str, Any]
) -> None:
    wanted = load_records(TRIMMED, cutoff_len=UNCUT)[0]["input_ids"]
    cutoff = -(-len(wanted) // 8) * 8
    packed = load_records(LONG, SHORT, cutoff_len=cutoff, chatreid_lazy=False, packing=True)
    found = next(row for row in packed if len(row["images"]) == 6)
    assert found["input_ids"][: len(wanted)] == wanted


def test_prompt_of_generation_is_trimmed(parse: Callable[..., Any], tokenizer_module: dict[str, Any]) -> None:
    from llamafactory.data import get_template_and_fix_tokenizer, loader

    from chatreid_plugin.training.loader import convert_record
    from chatreid_plugin.upstream import get_upstream

    def encode(record: Instruction, cutoff: int) -> Any:
        parsed = parse(3, cutoff_len=cutoff)
        template = get_template_and_fix_tokenizer(tokenizer_module["tokenizer"], parsed.data)
        processor = get_upstream(loader, "_get_dataset_processor")(
            parsed.data, "sft", template, tokenizer_module["tokenizer"], tokenizer_module["processor"], True
        )
        row = convert_record(record, "/images")
        return processor.preprocess_dataset({name: [value] for name, value in row.items()})

    wanted = encode(TRIMMED, UNCUT)
    length = len(wanted["input_ids"][0]) + len(wanted["labels"][0])
    found = encode(LONG, length)
    assert found["input_ids"] == wanted["input_ids"] and found["labels"] == wanted["labels"]


def test_other_data_in_the_mixture_is_cut_as_ever(
    load_rows: Callable[..., Any], write_dataset: Any, tmp_path: Path
) -> None:
    write_dataset(tmp_path / "info", [SHORT], tmp_path)
    info = tmp_path / "info" / "dataset_info.json"
    (tmp_path / "info" / "text.json").write_text(
        json.dumps([{"instruction": "Say yes. " * 900, "input": "", "output": "Yes"}])
    )
    info.write_text(json.dumps(json.loads(info.read_text()) | {"text": {"file_name": "text.json"}}))
    rows = load_rows(3, dataset="made,text", dataset_dir=str(tmp_path / "info"), chatreid_lazy=False, cutoff_len=600)
    assert len(rows) == 2
    assert len(rows[1]["input_ids"]) == 600 and rows[1]["images"] is None
