"""Traps of data sets on their way to rows: column types, saved tokens, the map cache, paths."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatreid_plugin import tasks
from chatreid_plugin.errors import ConfigError
from chatreid_plugin.shards import read_json, write_json
from chatreid_plugin.training import cutoff, loader


COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "images": "images"}
EAGER: dict[str, Any] = {"chatreid_lazy": False}


def enter_stock_data(data: Any, texts: int, images: int) -> None:
    """Write a data set of LLaMA-Factory's own format: rows without images, then rows with one."""
    plain = {"instruction": "Say yes.", "input": "", "output": "Yes", "images": None}
    pictured = plain | {"instruction": "Say yes. <image>", "images": [str(data.images / "0.jpg")]}
    data.folders.mkdir(exist_ok=True)
    (data.folders / "stock.json").write_text(json.dumps([plain] * texts + [pictured] * images))
    info = data.folders / "dataset_info.json"
    entries = read_json(info) if info.is_file() else {}
    write_json(info, entries | {"stock": {"file_name": "stock.json", "columns": COLUMNS}})


@pytest.mark.parametrize("workers", [1, 2])
def test_trap_06_rows_without_images_may_come_first(data: Any, workers: int) -> None:
    enter_stock_data(data, texts=1100, images=3)  # datasets guesses types from the first thousand
    keys = {"dataset": "stock", "dataset_dir": str(data.folders)}
    rows = data.load_rows(3, preprocessing_num_workers=workers, **keys, **EAGER)
    assert len(rows) == 1103
    assert rows[0]["images"] is None and Path(rows[1102]["images"][0]["path"]) == data.images / "0.jpg"
    assert len(rows[1102]["input_ids"]) > len(rows[0]["input_ids"]) + 8


@pytest.mark.parametrize("streaming", [False, True])
def test_trap_06_other_image_data_joins_a_mixture(data: Any, collate: Callable[..., Any], streaming: bool) -> None:
    keys = data.enter([data.make("r1")])
    enter_stock_data(data, texts=1, images=2)
    changes: dict[str, Any] = {"dataset": "stock,made", "dataset_dir": keys["dataset_dir"]} | EAGER
    if streaming:
        changes |= {"streaming": True, "dataloader_num_workers": 1}
        changes |= {"accelerator_config": {"dispatch_batches": False}}
    rows = list(data.load_rows(3, **changes))
    assert sorted(len(row["images"] or ()) for row in rows) == [0, 1, 1, 4]
    assert collate(*rows)["image_grid_thw"].shape == (6, 3)


def test_trap_11_saved_tokens_are_read_only_by_a_run_that_would_make_them(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``tests/training/test_tokenized_path.py`` goes through every key, and kills the run that writes them."""
    folder = tmp_path / "tokens"
    keys: dict[str, Any] = data.enter([data.make("r1")]) | {"tokenized_path": str(folder)} | EAGER
    made = data.load_rows(3, **keys)[:]
    monkeypatch.chdir("/")
    read = data.load_rows(3, **keys)
    assert read[:] == made and all(os.path.isfile(image["path"]) for image in read[0]["images"])
    with pytest.raises(ConfigError, match="was made from something else: chatreid_aspect is keep, was stretch"):
        data.load_rows(3, **keys, chatreid_aspect="keep")
    next(folder.glob("chatreid*.json")).unlink()
    with pytest.raises(ConfigError, match="holds no tokens that this plugin has written whole"):
        data.load_rows(3, **keys)


def list_cache_files(rows: Any) -> set[str]:
    return {file["filename"] for file in rows.cache_files}


def test_trap_12_an_edited_prompt_policy_or_code_meets_no_stale_map_cache(
    data: Any, tokenizer_module: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = data.enter([data.make("r1")]) | EAGER | {"cache_dir": str(tmp_path / "cache")}

    def load(**changes: Any) -> Any:
        return data.load_rows(3, **keys, **changes)

    first = load()
    assert list_cache_files(load()) == list_cache_files(first) != set()  # the cache is at work
    seen = {frozenset(list_cache_files(first))}
    edited = dataclasses.replace(tasks.TASKS["standard_reid"], prompts=("Who is in {image}? {gallery}",))
    with monkeypatch.context() as patch:
        patch.setitem(tasks.TASKS, "standard_reid", edited)
        assert load()[0]["input_ids"] != first[0]["input_ids"]
        seen.add(frozenset(list_cache_files(load())))
    for changes in ({"chatreid_stage": 1}, {"chatreid_aspect": "keep"}, {"chatreid_over_cutoff": "raise"}):
        seen.add(frozenset(list_cache_files(load(**changes))))
    for module in (loader, cutoff):
        with monkeypatch.context() as patch:
            patch.setattr(module, "find_code_version", lambda: "edited")
            seen.add(frozenset(list_cache_files(load())))
    with monkeypatch.context() as patch:  # LLaMA-Factory's model loader hands the YAML's limit to the processor
        patch.setattr(tokenizer_module["processor"], "image_max_pixels", 4096)
        seen.add(frozenset(list_cache_files(load())))
    assert len(seen) == 8
    assert list_cache_files(load()) == list_cache_files(first)


def test_trap_12_the_code_version_follows_every_file_that_decides_tokens(tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    versions: set[str] = set()
    for name in ("tasks.py", "training/cutoff.py"):
        for text in ("a = 1\n", "a = 2\n"):
            (tmp_path / name).write_text(text)
            versions.add(cutoff.find_code_version.__wrapped__(tmp_path))
    assert len(versions) == 4
    assert cutoff.find_code_version() == cutoff.find_code_version.__wrapped__(cutoff.PACKAGE)


def test_trap_17_paths_are_absolute_and_each_data_set_has_its_own_root(
    data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data.enter([data.make("r1")], "one")
    data.enter([data.make("r2")], "two")
    info = data.folders / "dataset_info.json"
    entries = read_json(info)
    for name, root in (("one", "../crops"), ("two", "../elsewhere")):  # relative to dataset_dir
        entries[name]["chatreid"]["image_root"] = root
    write_json(info, entries)
    monkeypatch.chdir(data.folders.parent)
    for lazy in (True, False):
        rows = data.load_rows(3, dataset="one,two", dataset_dir=data.folders.name, chatreid_lazy=lazy)
        paths = [row["images"][0]["path"] for row in rows]
        assert paths == [str(data.images / "0.jpg"), str(data.folders.parent / "elsewhere" / "0.jpg")]
