"""``chatreid_bad_image: skip`` through ``llamafactory-cli train``, with data loader workers and two processes."""

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatreid_plugin.training.images import LIST_NAME


pytestmark = pytest.mark.slow
RunCommand = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def media(workshop: Any, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """Return a copy of the images with three of Stage 1's spoilt, and path -> how its reason begins."""
    from chatreid_plugin.records import INSTRUCTION_SCHEMA
    from chatreid_plugin.shards import read_shard

    folder = shutil.copytree(workshop.images, tmp_path / "media")
    name = "chatreid_stage1_image_captioning"
    shards = sorted((workshop.dataset_dir / name).iterdir())
    rows = [row for shard in shards for row in read_shard(shard, INSTRUCTION_SCHEMA).to_pylist()]
    paths = list(dict.fromkeys(folder / image["path"] for row in rows for image in row["images"]))
    missing, empty, truncated = paths[0], paths[3], paths[7]
    missing.unlink()
    empty.write_bytes(b"")
    truncated.write_bytes(truncated.read_bytes()[:-300])
    reasons = {missing: "does not exist", empty: "cannot be opened", truncated: "is damaged"}
    return folder, {str(path): reason for path, reason in reasons.items()}


@pytest.mark.parametrize("processes", [1, 2])
def test_training_skips_a_missing_an_empty_and_a_truncated_file(
    run_llamafactory: RunCommand, workshop: Any, media: tuple[Path, dict[str, str]], tmp_path: Path, processes: int
) -> None:
    folder, reasons = media
    output = tmp_path / "out"
    changes = {"media_dir": folder, "chatreid_bad_image": "skip", "dataloader_num_workers": 2}
    overrides = workshop.list_overrides(1, output, **changes, max_steps=-1, num_train_epochs=2)
    environment = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"} if processes == 2 else {}
    result = run_llamafactory("train", "examples/stage1.yaml", overrides=overrides, **environment)
    assert result.returncode == 0, result.stderr[-4000:]
    log = [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == 2 * 16 / 2 / processes  # two epochs of 16 records, two a step and process
    assert all(map(math.isfinite, losses))
    lines = [json.loads(line) for line in (output / LIST_NAME).read_text().splitlines()]
    assert sorted(line["path"] for line in lines) == sorted(reasons)
    for line in lines:
        assert line["reason"].startswith(reasons[line["path"]])
        assert line["record"].startswith("chatreid_stage1_image_captioning-")
        assert result.stderr.count(f"chatreid: image {line['path']}") == 1
    assert "3 bad image(s) so far" in result.stderr
