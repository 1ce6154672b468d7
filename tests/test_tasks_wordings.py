"""Tests of the user's own wordings: checked with the recipe, numbered apart from ours, used by every reader."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chatreid_plugin.answers import render_turns
from chatreid_plugin.config import BuildSettings
from chatreid_plugin.engine.build import build_datasets
from chatreid_plugin.engine.show import list_examples
from chatreid_plugin.records import (
    INSTRUCTION_SCHEMA,
    Answer,
    Attribute,
    ImageReference,
    Instruction,
    Turn,
    convert_row_to_instruction,
)
from chatreid_plugin.shards import read_json, read_shard
from chatreid_plugin.tasks import OWN_VARIANT, TASKS, check_wording, render_prompt


OWN = ("Who of {gallery} is {image}?", "{image} once more in {gallery}")
RECORD = Instruction(
    "1", "standard_reid", (ImageReference("q"), ImageReference("a"), ImageReference("b")), 1, Answer()
)


@pytest.mark.parametrize(
    "wording",
    [
        "Who is {image}?",
        "{image} {image} {gallery}",
        "{image} {gallery} {caption}",
        "{image} {gallery} <image>",
        "{image} {gallery} <|im_end|>",
    ],
)
def test_wording_with_other_fields_or_marks_is_refused(wording: str) -> None:
    fault = check_wording(TASKS["standard_reid"], wording)
    assert fault is not None
    assert repr(wording) in fault and "{gallery} {image}" in fault


def test_wording_with_the_fields_in_any_order_is_accepted() -> None:
    assert [check_wording(TASKS["standard_reid"], wording) for wording in OWN] == [None, None]
    for task in TASKS.values():
        assert [check_wording(task, wording) for wording in task.prompts] == [None] * len(task.prompts)


def test_own_wordings_are_named_by_their_numbers() -> None:
    rendered = [render_prompt(replace(RECORD, variant=OWN_VARIANT + number), OWN) for number in range(3)]
    assert rendered[0] == "Who of A: <image> B: <image> is <image>?"
    assert rendered[1] == "<image> once more in A: <image> B: <image>"
    # One of three was taken out of dataset_info.json afterwards.
    assert rendered[2] == rendered[0]
    assert render_prompt(RECORD, OWN) == render_prompt(RECORD)


def test_own_wording_of_a_dialogue_is_its_first_turn(tmp_path: Path) -> None:
    own = "Who is {words}? {gallery}"
    assert check_wording(TASKS["dialogue_retrieval"], own) is None
    fault = check_wording(TASKS["dialogue_retrieval"], "Who is {words}, {letter}? {gallery}")
    assert fault is not None and "{gallery} {words} and no other field" in fault
    attributes = (Attribute(-1, "hat", "cap"),)
    asked = replace(RECORD, task="dialogue_retrieval", query_images=0, answer=Answer((0, 1)), attributes=attributes)
    record = replace(asked, turns=(Turn((0,), 0, "A man."),), variant=OWN_VARIANT + 1)
    (first, _), (second, answer) = render_turns(record, (own,))
    assert first == "Who is hat: cap? A: <image> B: <image> C: <image>"
    assert second == 'It is the person in A. What is known besides: "A man.". Select all images of this person.'
    assert answer == "A"


def make_recipe(root: Path, **changes: Any) -> BuildSettings:
    source = {"name": "own", "parser": "pattern", "root": root / "raw", "pattern": "{person}_{camera}.png"}
    values = {
        "sources": [source | {"train_share": 1.0}],
        "manifest_dir": root / "manifests",
        "output_dir": root / "out",
        "records": {"stage3": 60},
    }
    return BuildSettings.model_validate(values | changes)


def test_recipe_with_a_wrong_wording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a wording of standard_reid has to hold \{gallery\} \{image\}"):
        make_recipe(tmp_path, prompts={"standard_reid": ["Who?"]})
    with pytest.raises(ValueError, match="prompts names the unknown task reid"):
        make_recipe(tmp_path, prompts={"reid": OWN})


def test_own_wordings_are_built_in_and_entered(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "raw").mkdir()
    for person in range(4):
        for camera in range(2):
            Image.new("RGB", (16, 32), (60 * person, 100 * camera, 0)).save(
                tmp_path / "raw" / f"{person}_{camera}.png"
            )
    build_datasets(make_recipe(tmp_path, prompts={"standard_reid": OWN}, prompt_variants=1))
    name = "chatreid_stage3_standard_reid"
    assert read_json(tmp_path / "out" / "dataset_info.json")[name]["chatreid"]["prompts"] == list(OWN)
    rows = read_shard(tmp_path / "out" / name / "00000.parquet", INSTRUCTION_SCHEMA).to_pylist()
    records = [convert_row_to_instruction(row) for row in rows]
    assert {record.variant for record in records} == {0, OWN_VARIANT, OWN_VARIANT + 1}
    shown = [example.prompt for example in list_examples(tmp_path / "out", name, 0, len(records))]
    assert shown == [render_prompt(record, OWN) for record in records]
