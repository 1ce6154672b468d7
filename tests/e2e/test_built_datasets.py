"""Every task's data set, built from four raw layouts, trains: lazily, streamed, packed and tokenized first."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatreid_plugin.config import BuildSettings
from chatreid_plugin.demo.layouts import LAYOUTS
from chatreid_plugin.engine.build import build_datasets, name_dataset
from chatreid_plugin.tasks import list_stage_tasks


pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("built data sets")]
RunCommand = Callable[..., subprocess.CompletedProcess[str]]
DATASETS = [name_dataset(task.name, stage) for stage in (1, 2, 3) for task in list_stage_tasks(stage)]
STREAMING: dict[str, object] = {
    "chatreid_lazy": False,
    "streaming": True,
    # LLaMA-Factory's notes: the dispatcher would slice pixel_values, and no worker means no shard.
    "accelerator_config": "{dispatch_batches: false}",
    "dataloader_num_workers": 1,
}


@pytest.fixture(scope="module")
def dataset_dir(workshop: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build three records of every task from standard, cloth-changing, infrared and text data."""
    root = tmp_path_factory.mktemp("built")
    sources: list[dict[str, object]] = [
        {
            "name": "world",
            "parser": "market1501",
            "root": workshop.images,
            "captions": workshop.images / "captions.jsonl",
        }
    ]
    for name in ("ltcc", "sysumm01", "cuhkpedes"):
        LAYOUTS[name](root / name, 0)
        sources.append({"name": name, "root": root / name})
    settings = {
        "sources": [source | {"allow_count_mismatch": True} for source in sources],
        "manifest_dir": root / "manifests",
        "output_dir": root / "dataset_info",
        "records": {"stage1": 4, "stage2": 28, "stage3": 44},
        "stage2_ratios": {task.name: 1.0 for task in list_stage_tasks(2)},
        "stage3_ratios": {task.name: 1.0 for task in list_stage_tasks(3)},
        "gallery": {"min_size": 2, "max_size": 4},
        "records_per_shard": 2,
    }
    report = build_datasets(BuildSettings.model_validate(settings))
    assert report.datasets == dict.fromkeys(DATASETS, 4)
    return root / "dataset_info"


@pytest.fixture(scope="module")
def train(run_llamafactory: RunCommand, workshop: Any, dataset_dir: Path) -> Callable[..., list[float]]:
    """Return a function that trains one epoch on every task's data set and returns the losses."""

    def run(output: Path, **changes: object) -> list[float]:
        changes = {
            "dataset_dir": str(dataset_dir),
            "dataset": ",".join(DATASETS),
            "per_device_train_batch_size": 4,
            "max_steps": len(DATASETS),
        } | changes
        overrides = workshop.list_overrides(2, output, **changes)
        result = run_llamafactory("train", "examples/stage2.yaml", overrides=overrides)
        assert result.returncode == 0, result.stderr[-4000:]
        lines = [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "loss" in line]

    return run


@pytest.mark.parametrize("changes", [{}, STREAMING], ids=["lazy", "streaming"])
def test_every_data_set_trains(train: Callable[..., list[float]], changes: dict[str, object], tmp_path: Path) -> None:
    losses = train(tmp_path / "out", **changes)
    assert len(losses) == len(DATASETS)
    assert all(0 < loss < 20 for loss in losses)


def test_packed_records_train(train: Callable[..., list[float]], tmp_path: Path) -> None:
    packing: dict[str, object] = {"chatreid_lazy": False, "neat_packing": True, "cutoff_len": 1024}
    losses = train(tmp_path / "out", per_device_train_batch_size=1, max_steps=3, **packing)
    assert len(losses) == 3 and all(0 < loss < 20 for loss in losses)


def test_every_data_set_trains_from_a_tokenized_path(train: Callable[..., list[float]], tmp_path: Path) -> None:
    tokenized = {"chatreid_lazy": False, "tokenized_path": str(tmp_path / "tokenized")}
    # LLaMA-Factory's first run writes the folder, the second reads it.
    first = train(tmp_path / "first", **tokenized)
    assert len(first) == len(DATASETS)
    assert (tmp_path / "tokenized").is_dir()
    assert train(tmp_path / "second", **tokenized) == pytest.approx(first)
