"""Tests of the reading order in CONTRIBUTING.md: it names the files whose code one evaluation runs, and no others."""

import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest

# Imported here, so that what runs below is no module being loaded.
import chatreid_plugin.eval.__main__ as evaluator
import chatreid_plugin.eval.backends.transformers  # noqa: F401
from chatreid_plugin.datasets.registry import load_modules


ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "chatreid_plugin"
MOST = 20


@pytest.fixture(scope="module")
def section() -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return text.partition("## Read one evaluation\n")[2].partition("\n## ")[0]


def list_read(section: str) -> list[str]:
    return re.findall(r"^\d+\. `([^`]+)`: ", section, re.MULTILINE)


def note_files(call: Callable[[], int]) -> set[str]:
    """Return the files of the evaluator and of the data sets in which a function ran."""
    found = set[str]()
    gc.collect()  # what an earlier test left half-way, as a generator, would run to its end below
    before = sys.getprofile()

    def note(frame: FrameType, event: str, argument: object) -> None:
        found.add(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        assert call() == 0
    finally:
        sys.setprofile(before)
    paths = [
        Path(name).relative_to(PACKAGE).as_posix()
        for name in found
        if name.endswith(".py") and Path(name).is_relative_to(PACKAGE)
    ]
    return {path for path in paths if path.startswith(("eval/", "datasets/"))}


def test_reading_order_has_few_files_that_exist(section: str) -> None:
    files = list_read(section)
    assert re.findall(r"^(\d+)\. ", section, re.MULTILINE) == [str(number + 1) for number in range(len(files))]
    assert 10 <= len(files) <= MOST
    assert [name for name in files if not ((ROOT if name.endswith(".yaml") else PACKAGE) / name).is_file()] == []


def test_reading_order_names_what_an_evaluation_runs(
    section: str, checkpoint: Path, parse_layout: Callable[[str], Path], tmp_path: Path
) -> None:
    load_modules()
    arguments = {
        "data.manifest": parse_layout("market1501"),
        "data.max_queries": 2,
        "model.model_name_or_path": checkpoint,
        "model.device": "cpu",
        "output.output_dir": tmp_path / "out",
    }
    changes = [f"{key}={value}" for key, value in arguments.items()]
    ran = note_files(lambda: evaluator.main([str(ROOT / "eval" / "market1501.yaml"), *changes]))
    read = {name for name in list_read(section) if name.endswith(".py")}
    passed = set(re.findall(r"`([^`]+\.py)`", section.partition("This evaluation passes through")[2]))
    assert read - ran == set(), "listed, though nothing in them runs"
    assert ran - read - passed == set(), "run, though the list does not name them"
    assert passed & read == set()
    assert passed - ran == set(), "said to be passed through, though nothing in them runs"
