"""What we ship and show: every recipe of the data engine validates, and the README names files that exist."""

import re
from pathlib import Path

import pytest

from chatreid_plugin.config import BuildSettings, load_settings
from chatreid_plugin.tasks import list_stage_tasks


ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["data_engine.yaml", "data_engine_full.yaml", "folder_of_crops.yaml"])
def test_recipe_of_the_data_engine_validates(name: str) -> None:
    settings = load_settings(ROOT / "examples" / name, [], BuildSettings)
    assert set(settings.records) == {"stage1", "stage2", "stage3"}
    assert set(settings.stage2_ratios) == {task.name for task in list_stage_tasks(2)}


def test_recipe_in_the_readme_validates(tmp_path: Path) -> None:
    block = re.search(r"```yaml\n(# my_crops\.yaml\n.*?)```", README, re.DOTALL)
    assert block is not None
    path = tmp_path / "my_crops.yaml"
    path.write_text(block.group(1), encoding="utf-8")
    settings = load_settings(path, [], BuildSettings)
    assert settings.sources[0].pattern == "{person}/{camera}_{index}.png"


def test_readme_names_files_that_exist() -> None:
    names = set(re.findall(r"(?:examples|eval)/[a-z0-9_]+\.yaml", README))
    assert {"examples/stage1.yaml", "examples/stage2.yaml", "examples/stage3.yaml", "eval/market1501.yaml"} <= names
    assert [name for name in sorted(names) if not (ROOT / name).is_file()] == []
