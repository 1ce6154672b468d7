"""Saved tokens through LLaMA-Factory's own get_dataset: read again only by a run that would make the same."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chatreid_plugin.errors import ConfigError, DataError
from chatreid_plugin.records import Answer, ImageReference, Instruction
from chatreid_plugin.shards import read_json, write_json
from chatreid_plugin.training.tokenized_path import STAMP


RECORD = Instruction(
    "one-1",
    "standard_reid",
    tuple(ImageReference(f"{n}.jpg", 56, 112) for n in range(4)),
    1,
    Answer(indices=(0,)),
    dataset="tiny",
)


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


@pytest.fixture
def load(load_rows: Callable[..., Any], tokens: Path) -> Callable[..., Any]:
    """Return a function that loads the workshop's Stage 3 records through ``tokens``."""

    def load_tokens(**changes: Any) -> Any:
        return load_rows(3, **{"chatreid_lazy": False, "tokenized_path": str(tokens)} | changes)

    return load_tokens


def test_saved_tokens_are_read_from_another_working_directory(
    load: Callable[..., Any], tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = load()[:]
    assert (tokens / STAMP).is_file()
    assert [path.name for path in tmp_path.glob(".tokens*")] == []
    before = (tokens / STAMP).stat().st_mtime_ns
    monkeypatch.chdir("/")
    read = load()
    assert (tokens / STAMP).stat().st_mtime_ns == before
    assert read[:] == made
    assert all(os.path.isfile(image["path"]) for image in read[0]["images"])


CHANGES: dict[str, tuple[Any, str]] = {
    "cutoff_len": (1024, "cutoff_len is 1024, was 4096"),
    "chatreid_aspect": ("keep", "chatreid_aspect is keep, was stretch"),
    "chatreid_over_cutoff": ("raise", "chatreid_over_cutoff is raise, was trim"),
    "dataset": ("chatreid_stage1_image_captioning", "dataset chatreid_stage1_image_captioning: records is "),
    "media_dir": ("/moved", "images is /moved, was "),
    "train_on_prompt": (True, "train_on_prompt is True, was False"),
}


@pytest.mark.parametrize("key", CHANGES)
def test_tokens_of_other_settings_are_refused(load: Callable[..., Any], tokens: Path, key: str) -> None:
    load(cutoff_len=4096)
    value, message = CHANGES[key]
    with pytest.raises(ConfigError, match=f"tokenized_path: {tokens} was made from something else: .*{message}"):
        load(**{"cutoff_len": 4096, key: value})


def test_tokens_of_other_records_or_wordings_are_refused(
    load: Callable[..., Any], write_dataset: Callable[..., Path], tokens: Path, tmp_path: Path
) -> None:
    keys = {"dataset": "made", "dataset_dir": str(tmp_path / "info")}
    write_dataset(tmp_path / "info", [RECORD], tmp_path)
    load(**keys)
    info = tmp_path / "info" / "dataset_info.json"
    entries = read_json(info)
    entries["made"]["chatreid"]["prompts"] = ["{image} Which one? {gallery}"]
    write_json(info, entries)
    with pytest.raises(ConfigError, match="dataset made: prompts is "):
        load(**keys)
    write_dataset(tmp_path / "info", [RECORD, replace(RECORD, id="one-2")], tmp_path)
    with pytest.raises(ConfigError, match="dataset made: records is "):
        load(**keys)


def test_tokens_of_other_pixel_limits_are_refused(
    load: Callable[..., Any], tokenizer_module: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLaMA-Factory's model loader hands the YAML's limits to the processor."""
    load()
    monkeypatch.setattr(tokenizer_module["processor"], "image_max_pixels", 4096)
    with pytest.raises(ConfigError, match="image_max_pixels is 4096, was 589824"):
        load()


def test_tokens_of_another_build_tokenizer_or_version_are_refused(load: Callable[..., Any], tokens: Path) -> None:
    load()
    stamp = read_json(tokens / STAMP)
    records = next(key for key in stamp if key.endswith(": records"))
    for key in (records, "tokenizer", "version", "prompts", "image processor"):
        write_json(tokens / STAMP, stamp | {key: "older"})
        with pytest.raises(ConfigError, match=f"something else: {key} is .*, was older"):
            load()
    write_json(tokens / STAMP, stamp)
    load()


def test_partial_and_foreign_folders_are_refused(load: Callable[..., Any], tokens: Path) -> None:
    tokens.mkdir()
    (tokens / "dataset_dict.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"tokenized_path: {tokens} holds no tokens that .* Remove {tokens}"):
        load()
    shutil.rmtree(tokens)
    tokens.mkdir()  # empty: nobody's
    assert len(load()) > 0 and (tokens / STAMP).is_file()


def test_killed_run_leaves_nothing_that_the_next_one_reads(
    load: Callable[..., Any], tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import DatasetDict

    save = DatasetDict.save_to_disk

    def save_and_die(self: Any, path: str, **kwargs: Any) -> None:
        save(self, path, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DatasetDict, "save_to_disk", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            load()
    assert not tokens.exists() and len(list(tokens.parent.glob(".tokens*"))) == 1
    assert len(load()) > 0
    assert (tokens / STAMP).is_file() and not list(tokens.parent.glob(".tokens*"))


def test_a_failed_run_leaves_the_folder_free(load: Callable[..., Any], tokens: Path) -> None:
    with pytest.raises(DataError, match="cutoff_len"):
        load(cutoff_len=50, chatreid_over_cutoff="raise")
    assert not tokens.exists()


def test_stock_templates_keep_stock_behaviour(load_rows: Callable[..., Any], tokens: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "text.json", [{"instruction": "Say yes.", "input": "", "output": "Yes"}])
    write_json(tmp_path / "dataset_info.json", {"text": {"file_name": "text.json"}})
    keys = {"chatreid_stage": None, "chatreid_lazy": False, "template": "qwen2_vl", "dataset": "text"}
    for _ in range(2):
        assert len(load_rows(1, dataset_dir=str(tmp_path), tokenized_path=str(tokens), **keys)) == 1
    assert not (tokens / STAMP).exists()
