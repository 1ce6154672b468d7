"""A disk that takes no more: one message, and nothing half-written, from every command that writes files."""

import resource
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from chatreid_plugin.demo.layouts import write_layout
from chatreid_plugin.demo.world import write_world
from chatreid_plugin.engine.captions.jobs import open_log
from chatreid_plugin.engine.show import list_examples, write_page
from chatreid_plugin.errors import DataError
from chatreid_plugin.resources import copy_resources


def swap(workshop: Any, target: Path) -> None:
    from chatreid_plugin.training.checkpoint import compose_checkpoint

    compose_checkpoint(workshop.other_model, workshop.model, target)


def write_tiny_model(workshop: Any, target: Path) -> None:
    from chatreid_plugin.demo.people import sample_people
    from chatreid_plugin.demo.tiny_model import TinySizes
    from chatreid_plugin.demo.tiny_model import write_tiny_model as write

    sizes = TinySizes(hidden=32, layers=1, heads=2, vision_hidden=32, vision_layers=1, vocabulary=600)
    write(target, sample_people(5, 0), sizes=sizes)


WRITERS: dict[str, Callable[[Any, Path], object]] = {
    "swap": swap,
    "tiny-model": write_tiny_model,
    "init": lambda workshop, target: copy_resources(target),
    "synth": lambda workshop, target: write_layout("market1501", target),
    "world": lambda workshop, target: write_world(target, train_people=1, test_people=0, cameras=1),
    "show": lambda workshop, target: write_page(target, list_examples(workshop.dataset_dir, None, 0, 1)),
}


@contextmanager
def fill_disk(largest_file: int = 100) -> Generator[None, None, None]:
    """Let no file grow above so many bytes, which libraries in other languages than Python meet as well."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("command", WRITERS)
def test_writes_all_or_nothing_when_the_disk_is_full(command: str, workshop: Any, tmp_path: Path) -> None:
    target = tmp_path / "target"
    with fill_disk(), pytest.raises(DataError, match=r"target cannot be written: .*File too large.* Make room"):
        WRITERS[command](workshop, target)
    assert list(tmp_path.iterdir()) == []
    WRITERS[command](workshop, target)
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("command", ["tiny-model", "init"])
def test_leaves_a_folder_with_other_files_as_it_was_when_the_disk_is_full(
    command: str, workshop: Any, tmp_path: Path
) -> None:
    own = tmp_path / "target" / "own.txt"
    own.parent.mkdir()
    own.write_text("mine")
    with fill_disk(), pytest.raises(DataError):
        WRITERS[command](workshop, own.parent)
    assert list(own.parent.iterdir()) == [own]
    WRITERS[command](workshop, own.parent)
    assert own.read_text() == "mine"
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]


def test_keeps_the_answers_before_and_no_part_of_the_next_when_the_disk_is_full(tmp_path: Path) -> None:
    path = tmp_path / "a.captions.jsonl"
    with open_log(path, keep=True) as log:
        log.append({"path": "1.jpg"})
        with fill_disk(40), pytest.raises(DataError, match=r"captions\.jsonl cannot be written: .*File too large"):
            log.append({"path": "2.jpg", "captions": ["A woman in a red coat."]})
        assert path.read_text() == '{"path": "1.jpg"}\n'
        log.append({"path": "2.jpg"})
    assert path.read_text() == '{"path": "1.jpg"}\n{"path": "2.jpg"}\n'


def test_says_so_in_one_line_when_its_output_is_a_file_on_a_full_disk() -> None:
    command = [sys.executable, "-m", "chatreid_plugin", "--version"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    message = "chatreid: The output cannot be written: No space left on device. Make room first.\n"
    assert (done.returncode, done.stderr) == (3, message)
