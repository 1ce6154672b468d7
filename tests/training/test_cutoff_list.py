"""The list of trimmed records: written by whoever tokenizes, found again with cached and saved tokens, reported."""

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chatreid_plugin.records import Answer, ImageReference, Instruction
from chatreid_plugin.training.cutoff import LIST_NAME, LIST_VARIABLE, TrimmedReport, describe_trimmed


IMAGES = tuple(ImageReference(f"{n}.jpg", 56 + 14 * (n % 3), 112 + 28 * (n % 4)) for n in range(9))
LONG = Instruction("long-1", "standard_reid", IMAGES, 1, Answer(indices=(2, 6)), dataset="tiny")
SHORT = replace(LONG, id="short-1", images=IMAGES[:3], answer=Answer(indices=(1,)))
UNCUT = 4096


@pytest.fixture
def load(load_rows: Callable[..., Any], write_dataset: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    """Return a function that gives the rows of a long and a short record as LLaMA-Factory's get_dataset does."""
    write_dataset(tmp_path / "info", [LONG, SHORT], tmp_path)

    def load_records(**changes: Any) -> Any:
        return load_rows(3, dataset="made", dataset_dir=str(tmp_path / "info"), **changes)

    return load_records


@pytest.fixture
def cutoff(load: Callable[..., Any]) -> int:
    """Return a length that the long record exceeds by one token."""
    return len(load(cutoff_len=UNCUT)[0]["input_ids"]) - 1


def test_list_and_report_count_each_record_once(
    load: Callable[..., Any], cutoff: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report, control = TrimmedReport(), SimpleNamespace()
    assert describe_trimmed() is None
    report.on_epoch_end(None, SimpleNamespace(is_world_process_zero=True), control)
    rows = load(cutoff_len=cutoff)  # the example that is printed is read here
    _ = rows[0], rows[1]
    path = tmp_path / "out" / "chatreid_trimmed.txt"
    assert path.read_text() == "long-1\t1\n" * 2
    capsys.readouterr()
    report.on_epoch_end(None, SimpleNamespace(is_world_process_zero=False), control)
    report.on_epoch_end(None, SimpleNamespace(is_world_process_zero=True), control)
    line = f"chatreid: 1 record(s) over cutoff_len lost 1 gallery image(s); {path} lists them.\n"
    assert capsys.readouterr().err == line


def test_a_new_run_starts_a_new_list(
    parse: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out" / "chatreid_trimmed.txt"
    path.parent.mkdir()
    path.write_text("old\t1\n")
    monkeypatch.setenv(LIST_VARIABLE, "elsewhere")
    for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt"):  # the marks of a whole checkpoint
        (tmp_path / name).touch()
    parse(3, resume_from_checkpoint=str(tmp_path))
    assert path.exists() and describe_trimmed() is not None
    parse(3)
    assert not path.exists() and describe_trimmed() is None


@pytest.mark.parametrize("packing", [False, True])
def test_list_is_written_again_when_the_map_comes_from_the_cache(
    load: Callable[..., Any], cutoff: int, tmp_path: Path, packing: bool
) -> None:
    path = tmp_path / "out" / LIST_NAME
    cutoff = -(-cutoff // 8) * 8 - 8
    for _ in range(2):
        load(cutoff_len=cutoff, chatreid_lazy=False, packing=packing)
        assert path.read_text() == "long-1\t1\n"
    load(cutoff_len=UNCUT, chatreid_lazy=False)
    assert not path.exists()


def test_list_comes_back_with_saved_tokens(load: Callable[..., Any], cutoff: int, tmp_path: Path) -> None:
    path = tmp_path / "out" / LIST_NAME
    for _ in range(2):
        load(cutoff_len=cutoff, chatreid_lazy=False, tokenized_path=str(tmp_path / "tokens"))
        assert path.read_text() == "long-1\t1\n"


@pytest.mark.slow
def test_epoch_ends_with_one_line_when_workers_tokenize(
    run_llamafactory: Callable[..., subprocess.CompletedProcess[str]], workshop: Any, tmp_path: Path
) -> None:
    changes = {"cutoff_len": 165, "dataloader_num_workers": 2, "max_steps": -1, "num_train_epochs": 1}
    names = [f"chatreid_stage2_{kind}" for kind in ("image_to_image_many_to_many", "text_to_image_one_to_many")]
    overrides = workshop.list_overrides(2, tmp_path / "out", dataset=",".join(names), **changes)
    result = run_llamafactory("train", "examples/stage2.yaml", overrides=overrides)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line for line in result.stderr.splitlines() if "over cutoff_len lost" in line]
    listed = {line.split("\t")[0] for line in (tmp_path / "out" / "chatreid_trimmed.txt").read_text().splitlines()}
    assert len(lines) == 1 and f"chatreid: {len(listed)} record(s)" in lines[0]
    assert len(listed) > 1
