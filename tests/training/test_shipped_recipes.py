"""Every training recipe that we ship is accepted by LLaMA-Factory, and says how it is launched."""

from pathlib import Path
from typing import Any

import pytest
import yaml


ROOT = Path(__file__).parents[2]
ALL = sorted((ROOT / "examples").rglob("*.yaml"))
RECIPES = [path for path in ALL if "do_train: true" in path.read_text()]


def name_recipe(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", RECIPES, ids=name_recipe)
def test_recipe_is_accepted_and_says_how_it_is_launched(path: Path, workshop: Any, tmp_path: Path) -> None:
    from llamafactory.hparams import get_train_args

    values = yaml.safe_load(path.read_text())
    stage = 2 if "chatreid_encoder" in values else values["chatreid_stage"]
    changes = workshop.list_overrides(stage, tmp_path / "out", cache_dir=str(tmp_path))
    if "chatreid_encoder" not in values:
        changes.pop("chatreid_encoder", None)
    _, data, training, finetuning, _ = get_train_args(values | changes)
    assert data.chatreid_stage == values["chatreid_stage"]
    assert training.do_train
    assert finetuning.finetuning_type == values["finetuning_type"]
    launch = path.read_text().split("### ")[0]
    assert f"llamafactory-cli train {name_recipe(path)}" in launch


def test_the_stages_their_variants_and_the_ablation_are_there() -> None:
    names = {path.stem for path in RECIPES}
    assert names >= {
        "stage1",
        "stage2",
        "stage3",
        "stage2_lora",
        "stage3_lora",
        "stage3_only",
        "stage2_without_stage1",
    }
