"""Records of several turns through LLaMA-Factory's own multi-turn path: messages, labels, trimming, generation."""

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from chatreid_plugin.answers import read_answer, render_turns
from chatreid_plugin.records import Answer, Attribute, ImageReference, Instruction, Turn
from chatreid_plugin.training.cutoff import drop_distractor
from chatreid_plugin.training.loader import convert_record


IMAGES = tuple(ImageReference(f"{n}.jpg", 56 + 14 * (n % 3), 112 + 28 * (n % 4)) for n in range(8))
LONG = Instruction(
    "long-1",
    "dialogue_retrieval",
    IMAGES,
    0,
    Answer((2, 6)),
    attributes=(Attribute(-1, "upper_colour", "red"),),
    dataset="tiny",
    turns=(Turn((1, 6), 6, "A man with a bag."), Turn((1,), None, "", "hat", "cap")),
)
# Without the last images that no turn names, 7, 5 and 4.
TRIMMED = replace(
    LONG,
    images=tuple(IMAGES[n] for n in (0, 1, 2, 3, 6)),
    answer=Answer((2, 4)),
    turns=(replace(LONG.turns[0], indices=(1, 4), confirmed=4), LONG.turns[1]),
)
PAIR = Instruction("pair-1", "image_to_image_one_to_one", IMAGES[:2], 2, Answer(match=True), dataset="tiny")
UNCUT = 4096


def list_trained_texts(row: Any, tokenizer: Any) -> list[str]:
    """Return each run of tokens that carry a loss, as text."""
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    runs = [[token for token, _ in run] for trained, run in groupby(pairs, lambda pair: pair[1] >= 0) if trained]
    return [tokenizer.decode(run) for run in runs]


def test_messages_alternate_and_the_gallery_is_in_the_first() -> None:
    aligned = convert_record(LONG, "/data")
    assert [message["role"] for message in aligned["_prompt"]] == ["user", "assistant"] * 2 + ["user"]
    assert [message["content"].count("<image>") for message in aligned["_prompt"]] == [8, 0, 0, 0, 0]
    assert [message["role"] for message in aligned["_response"]] == ["assistant"]
    assert aligned["_response"][0]["content"] == "B"
    assert aligned["_prompt"][2]["content"].startswith('The person is G, also described as "A man with a bag.".')
    assert "hat: cap" in aligned["_prompt"][4]["content"]


@pytest.mark.parametrize("lazy", [True, False])
def test_loss_is_on_each_answer_and_on_nothing_else(
    load_records: Callable[..., Any], tokenizer_module: dict[str, Any], lazy: bool
) -> None:
    tokenizer = tokenizer_module["tokenizer"]
    row, other = load_records(LONG, PAIR, cutoff_len=UNCUT, chatreid_lazy=lazy)
    answers = [answer for _, answer in render_turns(LONG)]
    assert list_trained_texts(row, tokenizer) == [f"{answer}<|im_end|>\n" for answer in answers]
    assert [read_answer(LONG.task, text, 8).indices for text in answers] == [(2, 6), (1, 6), (1,)]
    assert list_trained_texts(other, tokenizer) == ["Yes<|im_end|>\n"]
    text = tokenizer.decode(row["input_ids"])
    assert text.count("<|im_start|>user") == text.count("<|im_start|>assistant") == 3
    assert text.count("<|im_start|>system") == 1
    # Pixels of every image once, before the first answer.
    assert text.count("<|vision_start|>") == len(row["images"]) == 8
    assert text.index("<|im_start|>assistant") > text.rindex("<|vision_end|>")


@pytest.mark.parametrize("lazy", [True, False])
def test_trimmed_dialogue_is_the_one_without_the_images(load_records: Callable[..., Any], lazy: bool) -> None:
    (wanted,) = load_records(TRIMMED, cutoff_len=UNCUT)
    (found,) = load_records(LONG, cutoff_len=len(wanted["input_ids"]), chatreid_lazy=lazy)
    assert found["input_ids"] == wanted["input_ids"] and found["labels"] == wanted["labels"]
    assert [Path(image["path"]).name for image in found["images"]] == [f"{n}.jpg" for n in (0, 1, 2, 3, 6)]


def test_images_of_any_answer_stay_and_one_other() -> None:
    record, dropped = LONG, []
    while (smaller := drop_distractor(record)) is not None:
        record, position = smaller
        dropped.append(position)
    assert dropped == [7, 5, 4, 3]
    assert record.images == tuple(IMAGES[n] for n in (0, 1, 2, 6))
    assert (record.answer.indices, record.turns[0]) == ((2, 3), replace(LONG.turns[0], indices=(1, 3), confirmed=3))


def test_packed_dialogues_keep_their_labels(
    load_records: Callable[..., Any], tokenizer_module: dict[str, Any]
) -> None:
    (row,) = load_records(LONG, PAIR, cutoff_len=1024, chatreid_lazy=False, packing=True, neat_packing=True)
    texts = list_trained_texts(row, tokenizer_module["tokenizer"])
    assert sorted(texts) == sorted([f"{answer}<|im_end|>\n" for _, answer in (*render_turns(LONG), ("", "Yes"))])


def test_generation_is_asked_for_the_last_answer(parse: Callable[..., Any], tokenizer_module: dict[str, Any]) -> None:
    from llamafactory.data import get_template_and_fix_tokenizer, loader

    from chatreid_plugin.upstream import get_upstream

    parsed = parse(3, cutoff_len=UNCUT)
    template = get_template_and_fix_tokenizer(tokenizer_module["tokenizer"], parsed.data)
    processor = get_upstream(loader, "_get_dataset_processor")(
        parsed.data, "sft", template, tokenizer_module["tokenizer"], tokenizer_module["processor"], True
    )
    row = convert_record(LONG, "/images")
    found = processor.preprocess_dataset({name: [value] for name, value in row.items()})
    decode = tokenizer_module["tokenizer"].decode
    assert decode(found["labels"][0]) == "B<|im_end|>\n"
    assert decode(found["input_ids"][0]).count("<|im_start|>assistant") == 3


@pytest.mark.parametrize("lazy", [True, False])
def test_data_set_of_a_version_without_dialogues_mixes_with_one(
    load_rows: Callable[..., Any], write_dataset: Callable[..., Path], tmp_path: Path, lazy: bool
) -> None:
    folder = tmp_path / "info"
    old = write_dataset(folder, [PAIR], tmp_path, name="old")
    pq.write_table(pq.read_table(old).drop_columns("turns"), old)
    write_dataset(folder, [LONG], tmp_path, name="new")
    for names in ("old,new", "new,old"):
        rows = load_rows(3, dataset=names, dataset_dir=str(folder), chatreid_lazy=lazy, cutoff_len=UNCUT)
        assert sorted(len(row["images"]) for row in rows) == [2, 8]
