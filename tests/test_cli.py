import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from chatreid_plugin import __main__, __version__, cli
from chatreid_plugin.errors import ChatReIDError, ConfigError, DataError, UpstreamError


SETTINGS = """
sources:
- {name: market1501, parser: market1501, root: raw}
records: {stage1: 10}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "build.yaml"
    path.write_text(SETTINGS)
    return str(path)


def replace_module(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    module = ModuleType(name)
    module.__dict__.update(functions)
    monkeypatch.setitem(sys.modules, name, module)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str, main: Any = cli.main) -> int:
    monkeypatch.setattr(sys, "argv", ["chatreid", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0)


def test_help_lists_the_commands_and_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "llamafactory", "pyarrow", "pydantic", "numpy", "gradio", "matplotlib")
    code = (
        "import sys\nsys.argv = ['chatreid', '--help']\nfrom chatreid_plugin import cli\n"
        f"try:\n    cli.main()\nfinally:\n    print('heavy:', *(set({heavy}) & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("heavy:\n")
    engine = ("list", "inspect", "synth", "parse", "caption", "filter", "audit", "build", "show", "stats")
    for command in ("init", "doctor", *engine, "swap", "eval", "tiny-model", "demo"):
        assert f" {command} " in result.stdout


def test_version_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"chatreid-plugin {__version__}\n"


def test_parse_hands_the_settings_over_and_prints_the_manifests(
    monkeypatch: pytest.MonkeyPatch, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_module(
        monkeypatch,
        "chatreid_plugin.engine.manifests",
        parse_sources=lambda settings, recheck: [settings.manifest_dir / f"seed{settings.seed}_{recheck}"],
    )
    assert run(monkeypatch, "parse", config, "seed=7", "manifest_dir=made") == 0
    assert run(monkeypatch, "parse", config, "--recheck", "seed=7", "manifest_dir=made") == 0
    assert capsys.readouterr().out == "made/seed7_False\nmade/seed7_True\n"


@pytest.mark.parametrize(("flags", "expected"), [([], (False, False)), (["--dry-run", "--overwrite"], (True, True))])
def test_build_hands_its_flags_over(
    monkeypatch: pytest.MonkeyPatch, config: str, capsys: pytest.CaptureFixture[str], flags: list[str], expected: Any
) -> None:
    def build_datasets(settings: Any, dry_run: bool, overwrite: bool) -> SimpleNamespace:
        return SimpleNamespace(render=lambda: f"{settings.records} {(dry_run, overwrite)}")

    replace_module(monkeypatch, "chatreid_plugin.engine.build", build_datasets=build_datasets)
    assert run(monkeypatch, "build", config, *flags) == 0
    assert capsys.readouterr().out == f"{{'stage1': 10}} {expected}\n"


def test_build_prints_json_and_nothing_else_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "crops").mkdir()
    for name in ("1_a.png", "1_b.png", "2_a.png", "2_b.png"):
        Image.new("RGB", (8, 16)).save(tmp_path / "crops" / name)
    config = tmp_path / "build.yaml"
    config.write_text(
        f"sources:\n- {{name: own, parser: pattern, root: {tmp_path}/crops, "
        'pattern: "{person}_{camera}.png", train_share: 1}\nrecords: {stage3: 3}\n'
    )
    assert run(monkeypatch, "build", str(config), f"output_dir={tmp_path}/out", "--dry-run", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["skipped"].pop("chatreid_stage3_text_to_image_reid") == "no captions"
    assert len(printed["skipped"]) == 8
    assert printed == {
        "output_dir": f"{tmp_path}/out",
        "datasets": {"chatreid_stage3_standard_reid": 2, "chatreid_stage3_image_to_image_one_to_one": 1},
        "skipped": printed["skipped"],
        "reused": [],
        "written": 0,
        "seconds": 0.0,
    }


@pytest.mark.parametrize(
    ("flags", "expected"),
    [([], "text ('there', None, 0, None)"), (["task", "--count", "2", "--start", "7", "--json"], "json")],
)
def test_show_hands_its_options_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], expected: str
) -> None:
    replace_module(
        monkeypatch,
        "chatreid_plugin.engine.show",
        list_examples=lambda directory, *rest: (str(directory), *rest),
        render_text=lambda examples: f"text {examples}",
        render_json=lambda examples: "json" if examples == ("there", "task", 7, 2) else "wrong",
        write_page=lambda path, examples: None,
    )
    assert run(monkeypatch, "show", "there", *flags) == 0
    assert capsys.readouterr().out == f"{expected}\n"


def test_show_writes_the_page_and_prints_its_path(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[object] = []
    replace_module(
        monkeypatch,
        "chatreid_plugin.engine.show",
        list_examples=lambda *arguments: ["example"],
        render_text=lambda examples: "text",
        render_json=lambda examples: "json",
        write_page=lambda path, examples: written.append(path),
    )
    assert run(monkeypatch, "show", "there", "--html", "page.html") == 0
    assert (written, capsys.readouterr().out) == ([Path("page.html")], "page.html\n")


@pytest.mark.parametrize(("flags", "expected"), [([], "text None"), (["--output", "o", "--json"], "{}")])
def test_stats_hands_its_options_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], expected: str
) -> None:
    def write_statistics(directory: Path, output: Path | None) -> SimpleNamespace:
        return SimpleNamespace(render=lambda: f"text {output}", to_json=lambda: "{}")

    replace_module(monkeypatch, "chatreid_plugin.engine.stats_page", write_statistics=write_statistics)
    assert run(monkeypatch, "stats", "there", *flags) == 0
    assert capsys.readouterr().out == f"{expected}\n"


@pytest.mark.parametrize("command", ["parse", "build"])
def test_source_named_twice_is_a_configuration_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    source = "- {name: market1501, parser: market1501, root: raw}\n"
    config = tmp_path / "twice.yaml"
    config.write_text(f"sources:\n{source}{source}records: {{stage1: 10}}\n")
    assert run(monkeypatch, command, str(config)) == ConfigError.exit_code
    assert "sources named twice: market1501" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "expected"), [([], "encoder"), (["--projector", "decoder"], "decoder")])
def test_swap_hands_its_paths_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], expected: str
) -> None:
    replace_module(
        monkeypatch,
        "chatreid_plugin.training.checkpoint",
        compose_checkpoint=lambda encoder, decoder, output, projector: (str(encoder), str(decoder), output, projector),
    )
    assert run(monkeypatch, "swap", "one", "two", "three", *options) == 0
    assert capsys.readouterr().out == f"{('one', 'two', Path('three'), expected)}\n"


def test_usage_error_exits_with_2(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "swap", "one", "two", "three", "--projector", "neither") == 2
    assert run(monkeypatch, "no-such-command") == 2


def test_eval_hands_every_argument_over(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[str] = []
    replace_module(monkeypatch, "chatreid_plugin.eval.__main__", main=lambda argv: received.extend(argv) or 3)
    assert run(monkeypatch, "eval", "a.yaml", "filter.top_k=5", "--help", "-x") == 3
    assert received == ["a.yaml", "filter.top_k=5", "--help", "-x"]


def test_demo_hands_its_options_over(monkeypatch: pytest.MonkeyPatch) -> None:
    received: dict[str, Any] = {}
    replace_module(
        monkeypatch, "chatreid_plugin.demo.pipeline", run_demo=lambda output, **rest: received.update(rest, to=output)
    )
    assert run(monkeypatch, "demo", "there", "--quick", "--seed=3") == 0
    assert received == {"to": Path("there"), "quick": True, "overwrite": False, "seed": 3}


@pytest.mark.parametrize("kind", [ChatReIDError, ConfigError, DataError, UpstreamError])
def test_own_error_is_one_message_and_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, config: str, capsys: pytest.CaptureFixture[str], kind: type[ChatReIDError]
) -> None:
    def fail(*_: Any) -> None:
        raise kind("what, where, what to do")

    replace_module(monkeypatch, "chatreid_plugin.engine.manifests", parse_sources=fail)
    assert run(monkeypatch, "parse", config) == kind.exit_code
    assert capsys.readouterr().err == "chatreid: what, where, what to do\n"


@pytest.mark.parametrize("main", [cli.main, __main__.main])
def test_interruption_exits_with_130(monkeypatch: pytest.MonkeyPatch, config: str, main: Any) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    replace_module(monkeypatch, "chatreid_plugin.engine.manifests", parse_sources=interrupt)
    assert run(monkeypatch, "parse", config, main=main) == 130


@pytest.mark.parametrize(("as_json", "expected"), [(["--json"], "{}\n"), ([], "text\n")])
def test_doctor_prints_its_report_and_exits_with_its_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], as_json: list[str], expected: str
) -> None:
    report = SimpleNamespace(exit_code=4, to_json=lambda: "{}", render=lambda: "text")
    replace_module(monkeypatch, "chatreid_plugin.doctor", examine=lambda: report)
    assert run(monkeypatch, "doctor", *as_json) == 4
    assert capsys.readouterr().out == expected


def test_init_copies_into_the_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(monkeypatch, "init", str(tmp_path)) == 0
    assert (tmp_path / "examples").is_dir()
    assert "file(s) copied" in capsys.readouterr().out
