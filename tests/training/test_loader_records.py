import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chatreid_plugin.errors import DataError
from chatreid_plugin.records import (
    Answer,
    ImageReference,
    Instruction,
    convert_instruction_to_row,
    convert_row_to_instruction,
)
from chatreid_plugin.tasks import OWN_VARIANT, render_prompt
from chatreid_plugin.training.cutoff import ROW_COLUMN
from chatreid_plugin.training.dataset_info import find_image_root
from chatreid_plugin.training.loader import ChatReIDConverter, convert_record


RECORD = Instruction(
    "stage3-5",
    "standard_reid",
    (ImageReference("a/q.jpg", 64, 128), ImageReference("a/g.jpg", 32, 64), ImageReference("a/h.jpg")),
    1,
    Answer(indices=(1,)),
    dataset="tiny",
)


def test_record_becomes_llamafactorys_aligned_form() -> None:
    aligned = convert_record(RECORD, "/data")
    stock = ["_prompt", "_response", "_system", "_tools", "_images", "_videos", "_audios"]
    assert list(aligned) == [*stock, ROW_COLUMN]
    (prompt,), (answer,) = aligned["_prompt"], aligned["_response"]
    assert prompt["role"] == "user" and prompt["content"].count("<image>") == 3
    assert answer == {"role": "assistant", "content": "B"}
    image = {"path": "/data/a/g.jpg", "width": 32, "height": 64, "record": "stage3-5", "task": "standard_reid"}
    assert aligned["_images"][1] == image
    assert aligned["_images"][2]["width"] == 0


@pytest.mark.parametrize(
    ("media_dir", "block", "expected"),
    [
        ("info", {"image_root": "../data"}, "data"),
        ("info", {"image_root": "/absolute"}, "/absolute"),
        ("info", None, "info"),
        ("moved", {"image_root": "../data"}, "moved"),
    ],
)
def test_image_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, media_dir: str, block: dict[str, str] | None, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = SimpleNamespace(media_dir=media_dir, dataset_dir="info")
    assert find_image_root(SimpleNamespace(chatreid=block), arguments) == str(tmp_path / expected)
    if block is None:
        assert find_image_root(SimpleNamespace(), arguments) == str(tmp_path / expected)


def test_llamafactory_hands_out_our_converter_and_keeps_the_image_root(workshop: Any) -> None:
    from llamafactory.data.converter import get_dataset_converter
    from llamafactory.data.parser import get_dataset_list
    from llamafactory.hparams.parser import DataArguments

    arguments: Any = DataArguments(template="chatreid", dataset_dir=str(workshop.dataset_dir))
    (attributes,) = get_dataset_list(["chatreid_stage3_standard_reid"], arguments.dataset_dir)
    converter: Any = get_dataset_converter("chatreid", attributes, arguments)
    assert isinstance(converter, ChatReIDConverter)
    assert converter.image_root == str(workshop.images)
    row = convert_instruction_to_row(RECORD)
    assert converter(row) == convert_record(RECORD, str(workshop.images))
    assert converter(row)[ROW_COLUMN] == row | {"own_prompts": []}
    assert pickle.loads(pickle.dumps(converter)).image_root == str(workshop.images)


def test_other_entries_of_dataset_info_are_read_as_before(tmp_path: Path) -> None:
    from llamafactory.data.parser import get_dataset_list

    entry = {"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "m"}, "num_samples": 3}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"other": entry}))
    (attributes,) = get_dataset_list(["other"], str(tmp_path))
    assert (attributes.formatting, attributes.messages, attributes.num_samples) == ("sharegpt", "m", 3)
    assert attributes.chatreid is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "teleport"}, "Record stage3-5: unknown task 'teleport'"),
        ({"answer": {"indices": [2], "match": None, "text": None}}, "Record stage3-5: answer index 2 is outside"),
        ({"answer": {"indices": [-1], "match": None, "text": None}}, "Record stage3-5: answer index -1 is outside"),
        ({"answer": None}, r"Record stage3-5: answer index \(none\)"),
        ({"images": []}, "Record stage3-5: .*"),
    ],
)
def test_wrong_record_is_named(changes: dict[str, Any], message: str) -> None:
    row = convert_instruction_to_row(RECORD) | changes
    converter = ChatReIDConverter(SimpleNamespace(), SimpleNamespace(media_dir="/m", dataset_dir="/d"))
    with pytest.raises(DataError, match=message):
        converter(row)


@pytest.mark.parametrize("path", ["../secret.png", "a/../../secret.png", "/etc/secret.png"])
def test_image_outside_the_root_is_refused(path: str) -> None:
    record = replace(RECORD, images=(*RECORD.images[:-1], ImageReference(path, 8, 8)))
    with pytest.raises(DataError, match=rf"Record {RECORD.id} names the image '{path}', which does not lie below"):
        convert_record(record, "/images")


def test_row_with_null_for_an_attribute_is_named() -> None:
    row = convert_instruction_to_row(RECORD) | {"attributes": [None]}
    with pytest.raises(DataError, match=rf"Record {RECORD.id} is damaged"):
        convert_row_to_instruction(row)


def test_rows_of_another_kind_are_refused() -> None:
    converter = ChatReIDConverter(SimpleNamespace(), SimpleNamespace(media_dir="/m", dataset_dir="/d"))
    with pytest.raises(DataError, match="This is not a ChatReID record"):
        converter({"instruction": "a", "output": "b"})


def test_spawned_worker_can_import_the_tokenizer_first() -> None:
    """Importing LLaMA-Factory from there would call hooks that need the modules while they are half-loaded."""
    code = "import sys, chatreid_plugin.training.loader; sys.exit('llamafactory' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_users_wordings_come_from_the_entry_and_renew_the_map_cache(workshop: Any) -> None:
    own = "Name the images of {image} among {gallery}"
    row = convert_instruction_to_row(replace(RECORD, variant=OWN_VARIANT))
    arguments = SimpleNamespace(dataset_dir=str(workshop.dataset_dir), media_dir=str(workshop.dataset_dir))
    plain, reworded = (
        ChatReIDConverter(SimpleNamespace(chatreid={"prompts": prompts}), arguments) for prompts in ([], [own])
    )
    assert reworded(row)["_prompt"][0]["content"] == "Name the images of <image> among A: <image> B: <image>"
    assert plain(row)["_prompt"][0]["content"] == render_prompt(RECORD)
    assert plain.wordings != reworded.wordings
