from pathlib import Path
from typing import Any

import pytest

from chatreid_plugin.training.recipe_checks import examine_recipe


ROOT = Path(__file__).parents[2]


def list_overrides(workshop: Any, stage: int, output: Path, **changes: object) -> list[str]:
    values = workshop.list_overrides(stage, output, **changes)
    return [f"{key}={'null' if value is None else value}" for key, value in values.items()]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shipped_recipe_has_no_error(workshop: Any, tmp_path: Path, stage: int) -> None:
    findings = examine_recipe(
        ROOT / "examples" / f"stage{stage}.yaml", list_overrides(workshop, stage, tmp_path / "out")
    )
    assert [finding.render() for finding in findings if finding.state == "error"] == []
    # The workshop's pixel limit is another one than inference's default.
    assert [finding.check for finding in findings if finding.state == "warning"] == ["image limits"]


def test_shipped_recipe_and_evaluation_show_the_same_images() -> None:
    findings = examine_recipe(ROOT / "examples" / "stage3.yaml", [], ROOT / "eval" / "market1501.yaml")
    assert [finding.state for finding in findings if finding.check == "image limits"] == ["ok"]


def test_recipe_that_does_not_parse_is_one_error(tmp_path: Path) -> None:
    (finding,) = examine_recipe(ROOT / "examples" / "stage1.yaml", ["no_such_key=1"])
    assert (finding.check, finding.state) == ("arguments", "error")
    assert "no_such_key" in finding.found


def test_every_fault_is_found_in_one_go(workshop: Any, tmp_path: Path) -> None:
    changes = {"deepspeed": "nowhere.json", "freeze_vision_tower": True, "cutoff_len": 64, "chatreid_encoder": "a"}
    overrides = list_overrides(workshop, 2, tmp_path / "out", chatreid_over_cutoff="raise", **changes)
    findings = examine_recipe(ROOT / "examples" / "stage2.yaml", overrides, tmp_path / "nowhere.yaml")
    errors = {finding.check.split()[0] for finding in findings if finding.state == "error"}
    assert errors == {"stage", "deepspeed", "chatreid_encoder", "length", "image"}
