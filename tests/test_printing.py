"""What reaches a terminal: no escape sequence of a file's name, of a model's or of a server's words."""

import json
import logging
import os
import sys
from pathlib import Path

import pytest

from chatreid_plugin import cli
from chatreid_plugin.errors import DataError
from chatreid_plugin.eval.__main__ import main as run_evaluation
from chatreid_plugin.printing import PrintableFormatter, make_printable, render_table, say


HOSTILE = "a\x1b[2Jb\rc\x9bd\u202ee\x00f\x7f\ud800"
SAFE = r"a\u001b[2Jb\u000dc\u009bd\u202ee\u0000f\u007f\ud800"


def test_what_moves_the_cursor_is_escaped_and_the_rest_stays() -> None:
    assert make_printable(HOSTILE) == SAFE
    assert make_printable("Zoë 人\t\n{}") == "Zoë 人\t\n{}"


def test_table_aligns_words_to_the_left_and_numbers_to_the_right() -> None:
    rows = [("a[bold]b[/bold]", "x", "5"), (":smile:", "y" * 300, "1,234")]
    head, *lines = render_table(("name", "kind", "count"), rows, words=2).splitlines()
    assert head == "name" + " " * 13 + "kind" + " " * 298 + "count"
    assert lines == ["a[bold]b[/bold]  x" + " " * 305 + "5", ":smile:" + " " * 10 + "y" * 300 + "  1,234"]


def test_json_stays_json() -> None:
    value = {"name": "a\x9b\x7f\u202e"}
    assert json.loads(make_printable(json.dumps(value, ensure_ascii=False))) == value


def test_errors_logs_and_reports_are_printable(capsys: pytest.CaptureFixture[str]) -> None:
    say(DataError(f"{HOSTILE} does not exist."), aside=True)
    say(HOSTILE)
    assert capsys.readouterr() == (f"{SAFE}\n", f"{SAFE} does not exist.\n")
    record = logging.LogRecord("x", logging.WARNING, "x", 1, "model %s", (HOSTILE,), None)
    assert PrintableFormatter("%(message)s").format(record) == f"model {SAFE}"


def test_evaluator_prints_a_hostile_path_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_evaluation(["no\x1b]0;owned\x07.yaml"]) == 2
    assert r"no\u001b]0;owned\u0007.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_names_of_files_are_printed_escaped(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bounding_box_train"
    for name in ("bounding_box_train", "bounding_box_test", "query"):
        (tmp_path / name).mkdir()
    (folder / "\x1b[2J.jpg").touch()
    (folder / os.fsdecode(b"\xff\xfe.jpg")).touch()
    monkeypatch.setattr(sys, "argv", ["chatreid", "inspect", "market1501", str(tmp_path), *flags])
    with pytest.raises(SystemExit):
        cli.main()
    output = "".join(capsys.readouterr())
    assert "\x1b" not in output and "\udcff" not in output
    assert r"\u001b[2J.jpg" in output
