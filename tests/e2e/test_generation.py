"""``predict_with_generate`` through LLaMA-Factory's own run, from the recipe to the file of predictions."""

import json
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml


pytestmark = pytest.mark.slow
RECIPE = Path(__file__).parents[2] / "examples" / "stage3.yaml"
DATASET = "chatreid_stage3_standard_reid"


@pytest.fixture
def run_prediction(workshop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that predicts a data set, and then gives the lines of the file that LLaMA-Factory writes."""
    from chatreid_plugin import _autoload

    _autoload.install()
    from llamafactory.hparams import get_train_args, parser
    from llamafactory.train.sft import workflow

    # LLaMA-Factory asks for nltk, jieba and rouge-chinese to score the answers; what it generates needs none of them.
    monkeypatch.setattr(parser, "_check_extra_dependencies", lambda *arguments: None)
    monkeypatch.setattr(workflow, "ComputeSimilarity", lambda tokenizer: None)

    def run(**changes: Any) -> list[dict[str, str]]:
        output = tmp_path / "out"
        values = yaml.safe_load(RECIPE.read_text()) | workshop.list_overrides(3, output)
        values |= {"do_train": False, "do_predict": True, "predict_with_generate": True, "dataset": None}
        values |= {"eval_dataset": DATASET, "per_device_eval_batch_size": 2, "max_new_tokens": 3}
        values |= {"do_sample": False, "cache_dir": str(tmp_path / "cache")} | changes
        workflow.run_sft(*get_train_args(values))
        return [json.loads(line) for line in (output / "generated_predictions.jsonl").read_text().splitlines()]

    return run


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """Return a list that fills with (given, expected) positions of the first step of every batch."""
    from transformers import Qwen2VLForConditionalGeneration

    found: list[dict[str, torch.Tensor]] = []
    forward = Qwen2VLForConditionalGeneration.forward

    @wraps(forward)  # generate reads its parameters
    def watch(self: Any, input_ids: Any = None, **named: Any) -> Any:
        if named.get("pixel_values") is not None:
            # What the training collator of LLaMA-Factory computes its positions with.
            expected, _ = self.model.get_rope_index(
                input_ids=input_ids,
                image_grid_thw=named["image_grid_thw"],
                attention_mask=named["attention_mask"],
                mm_token_type_ids=(input_ids == self.config.image_token_id).long(),
            )
            mask = named["attention_mask"].bool()
            given = named["position_ids"][-3:]
            found.append({"mask": mask, "given": given[:, mask], "expected": expected[:, mask]})
        return forward(self, input_ids=input_ids, **named)

    monkeypatch.setattr(Qwen2VLForConditionalGeneration, "forward", watch)
    return found


@pytest.mark.parametrize("lazy", [False, True])
def test_predict_with_generate_uses_the_positions_of_training(
    run_prediction: Any, batches: list[dict[str, torch.Tensor]], lazy: bool
) -> None:
    lines = run_prediction(chatreid_lazy=lazy)
    assert len(lines) == 4 and all(line["prompt"].count("<|vision_start|>") > 1 for line in lines)
    assert len(batches) == 2
    assert any(not batch["mask"].all() for batch in batches)  # records of several lengths, padded on the left
    for batch in batches:
        assert torch.equal(batch["given"], batch["expected"])
        assert len(batch["given"].unique(dim=0)) == 3
