"""bench_training.py: what it counts, against sums made by hand, and that both arms train on the same records."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest


SCRIPT = Path(__file__).with_name("bench_training.py")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import bench_training

    return bench_training


def test_counts_what_the_loss_of_a_batch_needs(script: Any) -> None:
    """Two records of 5 and 3 tokens, 2 and 1 of them answers; images of 4 and 8 patches."""
    import torch

    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    labels = torch.tensor([[-100, -100, -100, 7, 8], [-100, -100, 9, -100, -100]])
    grids = torch.tensor([[1, 2, 2], [1, 4, 2]])
    work = script.Work(patch=1000.0, attention=10.0, token=100.0, answer=20.0)
    counts = script.count_batch(work, mask, labels, grids)
    assert (counts.records, counts.tokens, counts.useful, counts.answers, counts.images) == (2, 10, 8, 3, 2)
    # Forward, and twice that backward.
    assert counts.flops == 3 * (4 * (1000 + 40) + 8 * (1000 + 80) + 8 * 100 + 3 * 20)
    total = counts + counts
    assert (total.records, total.flops) == (4, 2 * counts.flops)


def test_stock_record_holds_the_conversation_and_the_paths_alone(script: Any) -> None:
    aligned = {
        "_prompt": [{"role": "user", "content": "<image>?"}],
        "_response": [{"role": "assistant", "content": "Yes"}],
        "_images": [{"path": "/a.jpg", "width": 1, "height": 2, "record": "r"}],
    }
    assert script.make_stock_record(aligned) == {
        "messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "Yes"}],
        "images": ["/a.jpg"],
    }


def test_stock_arm_has_no_key_of_the_plugin(script: Any, tmp_path: Path) -> None:
    arguments = ["--batch", "4", "--folder", str(tmp_path), "--arm"]
    found = {arm: script.list_arguments(script.parse_options([*arguments, arm])[0]) for arm in script.ARMS}
    assert not [key for key in found["stock"] if key.startswith("chatreid")]
    assert found["stock"]["template"] == "qwen2_vl"
    names = found["plugin"]["dataset"].split(",")
    assert len(names) == 7
    assert found["stock"]["dataset"].split(",") == [f"stock_{name}" for name in names]
    differing = {key for key in found["stock"] if found["stock"][key] != found["plugin"].get(key)}
    assert differing == {"template", "dataset", "output_dir", "train_sampling_strategy"} | (
        {"preprocessing_num_workers"} & differing
    )


def test_each_lever_stands_alone(script: Any, tmp_path: Path) -> None:
    keys = ("train_sampling_strategy", "chatreid_loss")
    arguments = ["--batch", "4", "--folder", str(tmp_path), "--arm"]
    found = {arm: script.list_arguments(script.parse_options([*arguments, arm])[0]) for arm in script.ARMS}
    assert {arm: tuple(values.get(key) for key in keys) for arm, values in found.items()} == {
        "stock": ("random", None),
        "batches": ("group_by_length", "tokens"),  # the loss is taken out as the trainer is made
        "logits": ("random", "tokens"),
        "loss": ("random", "records"),
        "plugin": ("group_by_length", "tokens"),
    }


@pytest.mark.slow
def test_plugin_trains_on_records_that_stock_llamafactory_gets_word_for_word(script: Any, tmp_path: Path) -> None:
    """The stock arm's own training is left to a run by hand: each arm takes a process of ten seconds."""
    script.write_model_files(tmp_path / "model", "tiny")
    script.write_records(tmp_path, 10)
    info = json.loads((tmp_path / "data" / "dataset_info.json").read_text())
    names = [name for name in info if not name.startswith("stock_")]
    stock = {name: json.loads((tmp_path / "data" / f"stock_{name}.json").read_text()) for name in names}
    for name, records in stock.items():
        assert len(records) == sum(1 for _ in read_rows(tmp_path / "data" / name)), name
        assert all(Path(image).is_file() for record in records for image in record["images"])
    command = [sys.executable, str(SCRIPT), "--arm", "plugin", "--folder", str(tmp_path), "--batch", "2"]
    command += ["--steps", "1", "--warm-up", "1"]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["counts"]["records"] == 2
    assert result["counts"]["tokens"] >= result["counts"]["useful"] > result["counts"]["answers"] > 0
    assert result["seconds"] > 0 and result["reading"] > 0
    assert 0 < result["loss"] < 20


def read_rows(folder: Path) -> Iterator[Any]:
    for path in sorted(folder.glob("*.parquet")):
        yield from pq.read_table(path).to_pylist()
