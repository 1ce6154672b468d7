"""gpu.sh: what it keeps of a run whose stages fail or run out of time, without a GPU or a model."""

import os
import subprocess
import time
from pathlib import Path

import psutil


SCRIPT = Path(__file__).with_name("gpu.sh")
# Stands for Python: the first stage ends well, the second never ends, the third fails, the fourth ends well.
STAND_IN = """\
#!/bin/sh
echo "| $(basename "$1") |"
case "$1" in
  *bench_training.py) sleep 60; echo "| never |" ;;
  *bench_vision_tower.py) echo "no kernel" >&2; exit 3 ;;
esac
"""


def run(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    hidden = ("OUT", "WHEELS", "STAGES", "TMPDIR")
    own = {name: value for name, value in os.environ.items() if name not in hidden}
    own |= {
        "PYTHON": str(stand_in),
        "SIZE": "tiny",
        "DEVICE": "cpu",
        "LIMIT": "1",
        "TRAINING_LIMIT": "1",
        "TMPDIR": str(tmp_path),
    }
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=own | environment, capture_output=True, text=True, timeout=60, check=False)


def test_keeps_every_table_when_a_stage_is_stopped_and_another_fails(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(tmp_path, str(out))
    assert done.returncode == 1, done.stderr
    tables = {path.name: path.read_text() for path in out.glob("[1-4]_*.md")}
    assert tables == {
        "1_scoring.md": "| bench_scoring.py |\n",
        "2_training.md": "| bench_training.py |\n",
        "3_vision.md": "| bench_vision_tower.py |\n",
        "4_launchers.md": "| run_launchers.py |\n",
    }
    states = [
        line.split(" | ")[:3]
        for line in (out / "summary.md").read_text().splitlines()
        if line.startswith(("| 1", "| 2", "| 3", "| 4"))
    ]
    assert states == [
        ["| 1", "scoring", "done"],
        ["| 2", "training", "stopped after 1 s"],
        ["| 3", "vision", "failed (3)"],
        ["| 4", "launchers", "done"],
    ]
    assert "no kernel" in (out / "log.txt").read_text()
    assert not list(tmp_path.glob("gpu_run.*"))


def test_leaves_no_process_when_it_is_terminated(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    stand_in = tmp_path / "python"
    stand_in.write_text(f"#!/bin/sh\necho $$ >{mark}.new\nmv {mark}.new {mark}\nexec sleep 60\n")
    stand_in.chmod(0o755)
    own = os.environ | {"PYTHON": str(stand_in), "SIZE": "tiny", "DEVICE": "cpu", "TMPDIR": str(tmp_path)}
    with subprocess.Popen(["bash", str(SCRIPT), str(tmp_path / "out")], env=own, stdout=subprocess.DEVNULL) as process:
        for _ in range(600):
            if mark.exists():
                break
            time.sleep(0.05)
        process.terminate()
        assert process.wait(timeout=30) == 143
    stage = int(mark.read_text())
    for _ in range(600):
        if not psutil.pid_exists(stage) or psutil.Process(stage).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.05)
    else:
        raise AssertionError("the stage goes on")
    assert not list(tmp_path.glob("gpu_run.*"))


def test_runs_only_the_stages_asked_for_when_all_of_them_end_well(tmp_path: Path) -> None:
    done = run(tmp_path, STAGES="1 4", OUT=str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "1_scoring.md",
        "4_launchers.md",
        "log.txt",
        "summary.md",
    ]


def test_says_what_is_missing_when_no_folder_is_named(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode != 0
    assert "Name the folder for the tables" in done.stderr


def test_stops_before_the_stages_when_the_wheels_cannot_be_installed(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    done = run(tmp_path, str(tmp_path / "out"), WHEELS=str(tmp_path / "wheels"))
    assert done.returncode == 1
    assert "cannot be made" in done.stdout
    assert not list((tmp_path / "out").glob("[1-4]_*.md"))
