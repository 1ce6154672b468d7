"""Lazy tokenization, and the check of the shards, through LLaMA-Factory's own get_dataset."""

import dataclasses
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatreid_plugin.errors import ConfigError, DataError
from chatreid_plugin.records import Answer, ImageReference, Instruction
from chatreid_plugin.training.loader import LazyTokenizer


GOOD = Instruction(
    "good-1",
    "standard_reid",
    (ImageReference("q.jpg", 64, 128), ImageReference("a.jpg", 64, 128), ImageReference("b.jpg", 64, 128)),
    1,
    Answer(indices=(0,)),
    dataset="tiny",
)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_lazy_rows_are_the_eager_rows(load_rows: Callable[..., Any], stage: int) -> None:
    lazy, eager = load_rows(stage, chatreid_lazy=True), load_rows(stage, chatreid_lazy=False)
    assert len(lazy) == len(eager) > 15
    for number in range(len(eager)):
        first, second = lazy[number], eager[number]
        assert first["input_ids"] == second["input_ids"]
        assert first["labels"] == second["labels"]
        assert first["attention_mask"] == second["attention_mask"]
        assert first["images"] == second["images"]


def test_nothing_is_tokenized_before_it_is_asked_for(
    load_rows: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    original = LazyTokenizer.__call__

    def count(self: LazyTokenizer, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        calls.append(len(rows["id"]))
        return original(self, rows)

    monkeypatch.setattr(LazyTokenizer, "__call__", count)
    rows = load_rows(1)
    assert calls == [1]  # the example that LLaMA-Factory prints
    _ = rows[:5]
    assert calls == [1, 5]


def test_media_dir_wins_when_the_images_have_moved(load_rows: Callable[..., Any], tmp_path: Path) -> None:
    rows = load_rows(1, media_dir=str(tmp_path))
    assert rows[0]["images"][0]["path"].startswith(str(tmp_path))


def test_evaluation_set_is_lazy_too(parse: Callable[..., Any], tokenizer_module: dict[str, Any]) -> None:
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer

    parsed = parse(1, val_size=0.25)
    template = get_template_and_fix_tokenizer(tokenizer_module["tokenizer"], parsed.data)
    module = get_dataset(template, parsed.model, parsed.data, parsed.training, stage="sft", **tokenizer_module)
    train, evaluation = module["train_dataset"], module["eval_dataset"]
    assert (len(train), len(evaluation)) == (12, 4)
    assert train[0]["input_ids"] and evaluation[0]["input_ids"]


@pytest.mark.parametrize(("key", "value"), [("packing", True), ("tokenized_path", "cache"), ("streaming", True)])
def test_lazy_and_its_opposites_exclude_each_other(
    load_rows: Callable[..., Any], tmp_path: Path, key: str, value: Any
) -> None:
    changes: dict[str, Any] = {key: str(tmp_path / value) if key == "tokenized_path" else value}
    changes |= {"dataloader_num_workers": 1, "accelerator_config": {"dispatch_batches": False}}
    with pytest.raises(ConfigError, match=f"chatreid_lazy: true and {key} exclude each other"):
        load_rows(1, **changes)


def test_other_records_are_refused_when_lazy_and_mixed_when_not(
    load_rows: Callable[..., Any], workshop: Any, tmp_path: Path
) -> None:
    info = tmp_path / "info"
    info.mkdir()
    entries = json.loads((workshop.dataset_dir / "dataset_info.json").read_text())
    name = "chatreid_stage1_image_captioning"
    entry = entries[name] | {"chatreid": {"image_root": str(workshop.images)}}
    entry["file_name"] = str(workshop.dataset_dir / name)
    (info / "text.json").write_text(json.dumps([{"instruction": "Say yes.", "input": "", "output": "Yes"}]))
    (info / "dataset_info.json").write_text(json.dumps({name: entry, "text": {"file_name": "text.json"}}))
    with pytest.raises(ConfigError, match=r"data set text\.json has formatting: alpaca"):
        load_rows(1, dataset=f"{name},text", dataset_dir=str(info))
    rows = load_rows(1, dataset=f"{name},text", dataset_dir=str(info), chatreid_lazy=False)
    assert len(rows) == 17
    assert rows[16]["images"] is None


def test_stock_data_loads_as_without_the_plugin(load_rows: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text(json.dumps([{"instruction": "Say yes.", "input": "", "output": "Yes"}] * 3))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"text": {"file_name": "text.json"}}))
    keys = {"chatreid_stage": None, "chatreid_lazy": False, "template": "qwen2_vl", "dataset": "text"}
    assert len(load_rows(1, dataset_dir=str(tmp_path), **keys)) == 3


@pytest.mark.slow
def test_spawned_worker_gets_the_same_rows(load_rows: Callable[..., Any], capfd: pytest.CaptureFixture[str]) -> None:
    """Data loader workers may be spawned rather than forked; the transform has to be importable and picklable."""
    import torch.utils.data

    rows = load_rows(1)
    loader: Any = torch.utils.data.DataLoader(
        rows, batch_size=None, num_workers=1, multiprocessing_context=multiprocessing.get_context("spawn")
    )
    assert next(iter(loader))["input_ids"] == rows[0]["input_ids"]
    assert "is not extended" not in capfd.readouterr().err  # all hooks are at work in the worker


@pytest.fixture
def write_records(write_dataset: Callable[..., Path], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that writes a data set and returns the keys that name it."""

    def write(*records: Instruction) -> dict[str, Any]:
        write_dataset(tmp_path / "info", records, tmp_path)
        return {"dataset": "made", "dataset_dir": str(tmp_path / "info")}

    return write


def change(**changes: Any) -> Instruction:
    return dataclasses.replace(GOOD, id="bad-2", **changes)


BAD_RECORDS = {
    "task": (change(task="teleport"), "Record bad-2: unknown task 'teleport'"),
    "index": (change(answer=Answer(indices=(2,))), "Record bad-2: answer index 2 is outside the 2 options"),
    "images": (change(query_images=2), "Record bad-2: .*"),
    "size": (
        change(images=tuple(ImageReference(f"{n}.jpg") for n in "qab")),
        r"q\.jpg \(record bad-2\) does not exist",
    ),
}


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("kind", BAD_RECORDS)
def test_bad_record_is_named(
    load_rows: Callable[..., Any], write_records: Callable[..., Any], tmp_path: Path, kind: str, lazy: bool
) -> None:
    record, message = BAD_RECORDS[kind]
    with pytest.raises(DataError, match=message):
        rows = load_rows(3, chatreid_lazy=lazy, **write_records(GOOD, record))
        _ = rows[1]


def test_bad_record_is_named_from_processes_that_map_it(
    load_rows: Callable[..., Any], write_records: Callable[..., Any], tmp_path: Path
) -> None:
    keys = write_records(GOOD, BAD_RECORDS["index"][0])
    with pytest.raises(DataError, match="Record bad-2: answer index 2"):
        load_rows(3, chatreid_lazy=False, preprocessing_num_workers=2, **keys)


def cut_short(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-20])


SHARD_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (cut_short, r"made/00000\.parquet is not a readable Parquet file \(cut short\?\)"),
    "zero bytes": (lambda shard: shard.write_bytes(b""), r"made/00000\.parquet is not a readable Parquet file"),
    "empty folder": (lambda shard: shard.unlink(), "Data set made: .*made is empty"),
    "foreign file": (lambda shard: shard.with_name("notes.txt").touch(), r"notes\.txt is no Parquet shard"),
    "half-built": (
        lambda shard: shard.parent.with_name("made.json").write_text('{"complete": false}'),
        "made is only half-built, as made.json says",
    ),
}


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("kind", SHARD_FAULTS)
def test_shard_that_cannot_be_read_is_named(
    load_rows: Callable[..., Any], write_records: Callable[..., Any], tmp_path: Path, kind: str, lazy: bool
) -> None:
    keys = write_records(GOOD)
    spoil, message = SHARD_FAULTS[kind]
    spoil(tmp_path / "info" / "made" / "00000.parquet")
    with pytest.raises(DataError, match=message):
        load_rows(3, chatreid_lazy=lazy, **keys)


def test_missing_folder_and_data_set_without_records_are_named(
    load_rows: Callable[..., Any], write_records: Callable[..., Any], tmp_path: Path
) -> None:
    keys = write_records()
    with pytest.raises(DataError, match="Data set made: .* holds no records"):
        load_rows(3, **keys)
    (tmp_path / "info" / "made" / "00000.parquet").unlink()
    (tmp_path / "info" / "made").rmdir()
    with pytest.raises(DataError, match="Data set made: .*info/made does not exist"):
        load_rows(3, **keys)


def test_second_shard_is_checked_too(
    load_rows: Callable[..., Any], write_records: Callable[..., Any], tmp_path: Path
) -> None:
    keys = write_records(GOOD)
    first = tmp_path / "info" / "made" / "00000.parquet"
    second = first.with_name("00001.parquet")
    second.write_bytes(first.read_bytes())
    assert len(load_rows(3, **keys)) == 2
    cut_short(second)
    with pytest.raises(DataError, match=r"00001\.parquet"):
        load_rows(3, **keys)
