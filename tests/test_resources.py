from pathlib import Path

import pytest

from chatreid_plugin import resources
from chatreid_plugin.errors import ConfigError, DataError


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "root"
    for name in ("examples/stage1.yaml", "examples/deepspeed/z3.json", "eval/market1501.yaml", "README.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "dataset_info" / "chatreid_stage1").mkdir(parents=True)
    for name in ("README.md", "dataset_info.json", "chatreid_stage1/part-00000.parquet", "provenance.json"):
        (root / "dataset_info" / name).write_text(name)
    monkeypatch.setattr(resources, "find_resource_root", lambda: root)
    return root


def test_recipes_are_copied_and_built_shards_are_not(root: Path, tmp_path: Path) -> None:
    written = resources.copy_resources(tmp_path / "new" / "folder")
    assert [path.relative_to(tmp_path / "new" / "folder").as_posix() for path in written] == [
        "dataset_info/README.md",
        "dataset_info/dataset_info.json",
        "eval/market1501.yaml",
        "examples/deepspeed/z3.json",
        "examples/stage1.yaml",
    ]
    assert (tmp_path / "new/folder/examples/stage1.yaml").read_text() == "examples/stage1.yaml"


def test_nothing_is_written_when_a_file_differs(root: Path, tmp_path: Path) -> None:
    mine = tmp_path / "to" / "examples" / "stage1.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(ConfigError, match=r"1 file\(s\) that differ.*stage1\.yaml.*--force"):
        resources.copy_resources(tmp_path / "to")
    assert [path for path in (tmp_path / "to").rglob("*") if path.is_file()] == [mine]
    assert mine.read_text() == "mine"


def test_differing_file_is_overwritten_when_forced(root: Path, tmp_path: Path) -> None:
    resources.copy_resources(tmp_path / "to")
    (tmp_path / "to/eval/market1501.yaml").write_text("mine")
    assert resources.copy_resources(tmp_path / "to", force=True) == [tmp_path / "to/eval/market1501.yaml"]
    assert (tmp_path / "to/eval/market1501.yaml").read_text() == "eval/market1501.yaml"


def test_copying_twice_writes_nothing(root: Path, tmp_path: Path) -> None:
    resources.copy_resources(tmp_path / "to")
    assert resources.copy_resources(tmp_path / "to") == []


def test_file_as_destination_is_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        resources.copy_resources(tmp_path / "file")


@pytest.mark.parametrize("place", ["chatreid_plugin/resources", "."])
def test_root_is_the_shipped_folder_or_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(resources, "__file__", str(tmp_path / "chatreid_plugin" / "resources.py"))
    (tmp_path / "chatreid_plugin").mkdir()
    with pytest.raises(DataError, match="Install chatreid-plugin again"):
        resources.find_resource_root()
    for name in ("examples", "eval"):
        (tmp_path / place / name).mkdir(parents=True)
    assert resources.find_resource_root() == (tmp_path / place).resolve()


def test_installed_package_has_the_stage_recipes() -> None:
    found = {path.as_posix() for path in resources.list_resources(resources.find_resource_root())}
    assert {f"examples/stage{stage}.yaml" for stage in (1, 2, 3)} <= found
    assert {"eval/market1501.yaml", "dataset_info/dataset_info.json"} <= found
