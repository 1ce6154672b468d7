"""Stage 2 killed and resumed, and LoRA through both stages, by ``llamafactory-cli`` on a CPU."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from chatreid_plugin.checkpoints import read_system_prompt
from chatreid_plugin.shards import read_manifest
from chatreid_plugin.training.model import find_part
from tests.support import make_eval_settings


pytestmark = pytest.mark.slow
RunCommand = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parents[2]


def read_losses(output: Path) -> dict[int, float]:
    """Return step -> loss; of a step that was done twice, the last."""
    lines = [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]
    return {line["current_steps"]: line["loss"] for line in lines if "loss" in line}


def kill_after_checkpoint(command: list[str], environment: dict[str, str], checkpoint: Path) -> None:
    """Start a run and kill it, with no chance to tidy up, once its first checkpoint is whole."""
    running = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (checkpoint / "trainer_state.json").is_file() and time.monotonic() < deadline:
        assert running.poll() is None
        time.sleep(0.01)
    running.kill()
    running.communicate()  # what held the pipe has ended
    assert running.returncode == -signal.SIGKILL


def test_killed_stage_2_goes_on_with_the_same_losses_and_no_second_swap(
    run_llamafactory: RunCommand, workshop: Any, tmp_path: Path, fast_programs: Path, fast_environment: dict[str, str]
) -> None:
    encoder = shutil.copytree(workshop.other_model, tmp_path / "encoder")
    # Many steps, so that the kill comes before the end; the loss of each depends on the shuffled order of the records.
    changes = {"max_steps": 24, "save_steps": 4, "chatreid_encoder": str(encoder)}
    whole, output = tmp_path / "whole", tmp_path / "killed"
    result = run_llamafactory("train", "examples/stage2.yaml", overrides=workshop.list_overrides(2, whole, **changes))
    assert result.returncode == 0, result.stderr[-3000:]
    overrides = workshop.list_overrides(2, output, **changes)
    values = [f"{key}={'null' if value is None else value}" for key, value in overrides.items()]
    command = [str(fast_programs / "llamafactory-cli"), "train", "examples/stage2.yaml", *values]
    kill_after_checkpoint(command, fast_environment, output / "checkpoint-4")
    assert not (output / "model.safetensors").exists()
    composed = output / "chatreid_initial" / "model.safetensors"
    before = composed.stat()
    shutil.rmtree(encoder)  # what the swap was made from is not needed any more
    overrides |= {"resume_from_checkpoint": str(output / "checkpoint-4")}
    resumed = run_llamafactory("train", "examples/stage2.yaml", overrides=overrides)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "vision tensors from" not in resumed.stderr and "missing keys" not in resumed.stderr
    assert (composed.stat().st_ino, composed.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    wanted, found = read_losses(whole), read_losses(output)
    assert found == pytest.approx({step: wanted[step] for step in found}, rel=1e-5)
    assert set(range(5, 25)) <= set(found)
    ends = [load_file(folder / "model.safetensors") for folder in (whole, output)]
    assert all(torch.allclose(ends[0][name], tensor, atol=1e-5) for name, tensor in ends[1].items())


def score_pairs(checkpoint: Path, workshop: Any) -> Any:
    """Return what the evaluator, given a folder, says of an image and two others."""
    from chatreid_plugin.datasets.benchmark import make_image_query
    from chatreid_plugin.eval.backends.transformers import TransformersScorer
    from chatreid_plugin.eval.questions import IMAGE_PAIR

    values: dict[str, Any] = {"protocol": "folder", "manifest": "m.parquet", "output_dir": "unused", "device": "cpu"}
    values |= {"model_name_or_path": str(checkpoint), "dtype": "float32", "image_max_pixels": 8192}
    first, *others = read_manifest(workshop.root / "manifests" / "world.parquet")[0][:3]
    scorer = TransformersScorer(make_eval_settings(values).model, workshop.images)
    return scorer.score_pairs(make_image_query(first), others, IMAGE_PAIR)


def test_lora_through_stage_2_export_and_stage_3(run_llamafactory: RunCommand, workshop: Any, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import Qwen2VLForConditionalGeneration

    def read(folder: Path) -> dict[str, torch.Tensor]:
        return load_file(folder / "model.safetensors")

    adapter, merged, last = tmp_path / "stage2", tmp_path / "merged", tmp_path / "stage3"
    overrides = workshop.list_overrides(2, adapter, default_system="Compare people.")
    result = run_llamafactory("train", "examples/stage2_lora.yaml", overrides=overrides)
    assert result.returncode == 0, result.stderr[-3000:]
    composed = adapter / "chatreid_initial"
    assert {find_part(name) for name in load_file(adapter / "adapter_model.safetensors")} == {
        *("vision", "projector", "language")
    }

    folders = {"adapter_name_or_path": str(adapter), "export_dir": str(merged)}
    wrong = {"model_name_or_path": str(workshop.model)}
    refused = run_llamafactory("export", "examples/merge_lora.yaml", overrides=folders | wrong)
    assert refused.returncode != 0 and "chatreid_initial, which the decoder swap composed" in refused.stderr
    assert "Traceback" not in refused.stderr and not merged.exists()
    right = {"model_name_or_path": str(composed)}
    result = run_llamafactory("export", "examples/merge_lora.yaml", overrides=folders | right)
    assert result.returncode == 0, result.stderr[-3000:]

    assert [read_system_prompt(folder) for folder in (adapter, merged)] == ["Compare people."] * 2

    base: Any = Qwen2VLForConditionalGeneration.from_pretrained(composed, dtype=torch.float32)
    exported: Any = Qwen2VLForConditionalGeneration.from_pretrained(merged, dtype=torch.float32)
    tokens = torch.arange(20, 52)[None]
    with torch.inference_mode():
        plain = base(input_ids=tokens).logits
        wanted = PeftModel.from_pretrained(base, str(adapter))(input_ids=tokens).logits
        found = exported(input_ids=tokens).logits
    assert torch.allclose(found, wanted, atol=1e-4) and not torch.allclose(found, plain, atol=1e-3)
    changed = {find_part(n) for n, tensor in read(composed).items() if not torch.equal(tensor, read(merged)[n])}
    assert changed == {"vision", "projector", "language"}
    by_adapter, by_merged, by_base = (score_pairs(folder, workshop) for folder in (adapter, merged, composed))
    assert by_adapter == pytest.approx(by_merged, abs=1e-4)
    assert by_adapter != pytest.approx(by_base, abs=1e-3)

    overrides = workshop.list_overrides(3, last, model_name_or_path=str(merged))
    result = run_llamafactory("train", "examples/stage3_lora.yaml", overrides=overrides)
    assert result.returncode == 0, result.stderr[-3000:]
    assert {find_part(name) for name in load_file(last / "adapter_model.safetensors")} == {"language"}
