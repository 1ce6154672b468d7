"""A killed evaluation goes on where it stopped, in one process or several, and ends with the same results."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from chatreid_plugin.errors import ConfigError
from chatreid_plugin.eval import run as evaluation
from chatreid_plugin.eval.backends.files import RandomScorer
from chatreid_plugin.eval.distributed import Processes
from chatreid_plugin.eval.run import describe_fingerprint, run_evaluation
from chatreid_plugin.eval.scores import Scored, ScoreStore
from chatreid_plugin.eval.settings import EvalSettings
from tests.support import alter


MakeWorld = Callable[..., Path]
MakeSettings = Callable[..., EvalSettings]

# The evaluator with a scorer that takes its time: `python slow.py SECONDS CONFIG.yaml ...`.
SLOW = """
import sys, time
from chatreid_plugin.eval.backends.files import RandomScorer
from chatreid_plugin.eval.__main__ import main

pause, score_pairs = float(sys.argv[1]), RandomScorer.score_pairs

def score_slowly(self, query, candidates, task):
    time.sleep(pause)
    return score_pairs(self, query, candidates, task)

RandomScorer.score_pairs = score_slowly
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def slow(
    make_world: MakeWorld, tmp_path: Path, fast_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Return script and configuration of an evaluation of 40 queries, without the pause; python starts fast."""
    for name, value in fast_environment.items():
        monkeypatch.setenv(name, value)
    items = [("query", str(person), "1") for person in range(40)]
    items += [("gallery", str(person), str(camera)) for person in range(40) for camera in (2, 3)]
    script, config = tmp_path / "slow.py", tmp_path / "slow.yaml"
    script.write_text(SLOW)
    lines = [f"data: {{benchmark: folder, manifest: {make_world(items)}}}", "scoring: {backend: random}"]
    lines += ["filter: {source: none}", "output: {report_queries: 2, output_dir: out}"]
    config.write_text("\n".join(lines))
    return [str(script), str(config)]


def run(command: list[str], folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        ["python", *options, *command[:1], "0", *command[1:]],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )


def count_scored(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") - 1 for path in folder.glob("out/scores-*.jsonl"))


def kill_after(command: list[str], folder: Path, lines: int, *options: str) -> None:
    """Start it and kill it, with all its children, once so many more queries are on disk."""
    folder.mkdir(exist_ok=True)
    before = max(0, count_scored(folder))
    with subprocess.Popen(
        ["python", *options, *command[:1], "0.05", *command[1:]],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 120
        try:
            while count_scored(folder) < before + lines:
                assert process.poll() is None, "it ended before it could be killed"
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            # torchrun's workers are no members of its process group.
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                child.kill()
            process.communicate()  # whatever held the pipe has ended


def read_results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "results.json").read_text())


@pytest.mark.slow
def test_ends_with_the_same_results_when_killed_three_times(slow: list[str], tmp_path: Path) -> None:
    run(slow, tmp_path / "whole")
    for _ in range(3):
        kill_after(slow, tmp_path / "killed", 5)
    assert 15 <= count_scored(tmp_path / "killed") < 40
    assert not (tmp_path / "killed/out/results.json").exists()
    done = run(slow, tmp_path / "killed")
    assert "queries were scored before" in done.stderr
    for name in ("results.json", "rankings.parquet", "report.html"):
        assert (tmp_path / "killed/out" / name).read_bytes() == (tmp_path / "whole/out" / name).read_bytes(), name


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one_when_killed_and_resumed(slow: list[str], tmp_path: Path) -> None:
    options = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run(slow, tmp_path / "one")
    kill_after(slow, tmp_path / "two", 8, *options)
    shutil.copytree(tmp_path / "two", tmp_path / "fewer")
    parts = sorted(path.name for path in (tmp_path / "two/out").glob("scores-*"))
    assert len(parts) == 2 and ".rank1." in "".join(parts)
    done = run(slow, tmp_path / "two", *options)
    assert done.stdout.count("Written to out") == 1
    assert "queries were scored before" in done.stderr
    assert read_results(tmp_path / "two") == read_results(tmp_path / "one")
    (merged,) = (tmp_path / "two/out").glob("scores-*")
    assert len(merged.read_text().splitlines()) == 1 + 40

    # A single process takes up what several left.
    run(slow, tmp_path / "fewer")
    assert read_results(tmp_path / "fewer") == read_results(tmp_path / "one")


@pytest.mark.slow
def test_sigterm_ends_it_as_ctrl_c_does_where_sigint_is_ignored(slow: list[str], tmp_path: Path) -> None:
    ignore = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    command = [sys.executable, *slow[:1], "0.05", *slow[1:]]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=ignore)
    deadline = time.monotonic() + 60
    while count_scored(tmp_path) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted; finished queries are saved. Resume with:" in errors and "Traceback" not in errors


@pytest.mark.parametrize(("items", "count"), [(10, 3), (2, 4), (0, 2), (7, 1)])
def test_shares_are_contiguous_and_whole(items: int, count: int) -> None:
    shares = [list(Processes(rank, count).take_share(range(items))) for rank in range(count)]
    assert sum(shares, []) == list(range(items))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_a_second_run_is_refused_until_the_first_has_written_everything(
    make_world: MakeWorld, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    manifest = make_world()
    np.savez(tmp_path / "s.npz", scores=np.zeros((4, 12)), queries=["q"] * 4, gallery=["g"] * 12)
    settings = make_settings(manifest)
    others = [make_settings(manifest, backend="random"), make_settings(manifest, backend="scores", scores="s.npz")]
    write_page, write_results = evaluation.write_page, evaluation.write_results
    refused: list[str] = []

    def start_others() -> None:
        for other in others:
            with pytest.raises(ConfigError, match="another evaluation is writing into") as caught:
                run_evaluation(other)
            refused.append(str(caught.value))

    def write_page_late(*arguments: Any) -> None:
        start_others()
        write_page(*arguments)

    def write_results_late(*arguments: Any) -> None:
        start_others()
        write_results(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "write_page", write_page_late)
        patch.setattr(evaluation, "write_results", write_results_late)
        assert run_evaluation(settings).ranking.mean_ap == 1.0
    assert len(refused) == 4
    assert run_evaluation(others[0]).ranking.mean_ap < 1.0


def test_splits_hold_their_common_folder(
    make_world: MakeWorld,
    make_settings: MakeSettings,
    copy_splits: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manifest, write_page = make_world(), evaluation.write_page
    refused: list[str] = []

    def write_page_late(*arguments: Any) -> None:
        with pytest.raises(ConfigError, match="another evaluation") as caught:
            run_evaluation(make_settings(manifest))
        refused.append(str(caught.value))
        write_page(*arguments)

    monkeypatch.setattr(evaluation, "write_page", write_page_late)
    run_evaluation(make_settings(copy_splits(manifest, [1]), splits=[1]))
    assert len(refused) == 1


def test_overwrite_forgets_what_every_process_has_on_its_own_disk(
    make_world: MakeWorld, make_settings: MakeSettings, run_together: Callable[..., list[Any]], tmp_path: Path
) -> None:
    manifest = make_world()
    settings = [make_settings(manifest, backend="random", output_dir=tmp_path / f"disk{rank}") for rank in range(2)]
    fingerprint = describe_fingerprint(settings[0], RandomScorer())
    plan = evaluation.make_plan(settings[0])

    def leave_scores(rank: int) -> None:
        with ScoreStore(tmp_path / "disk1", fingerprint, rank=rank) as store:
            for index, query in enumerate(plan.benchmark.queries):
                candidates = plan.list_candidates(index)
                wrong = np.array([record.person_id == query.person_id for record in candidates], dtype=np.float32)
                store.add(store.make_key(query, candidates), Scored(wrong))

    expected = run_evaluation(make_settings(manifest, backend="random", output_dir=tmp_path / "one")).ranking.mean_ap
    assert expected < 1.0
    (tmp_path / "disk1").mkdir()
    for rank in (1, 7):
        leave_scores(rank)

    def run(overwrite: bool) -> list[float]:
        changes = {"overwrite": overwrite}
        calls = [partial(run_evaluation, alter(one, changes)) for one in settings]
        return [results.ranking.mean_ap for results in run_together(calls)]

    assert run(overwrite=False) == [1.0, 1.0]  # they are taken up, as those of a killed run shall be
    assert run(overwrite=True) == [expected] * 2
    assert run(overwrite=False) == [expected] * 2

    # The other machine took no part when it was overwritten.
    leave_scores(1)
    assert run(overwrite=False) == [expected] * 2
