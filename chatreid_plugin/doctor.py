"""``chatreid doctor``: is the plugin at work in this environment, and if not, why.

It imports the LLaMA-Factory modules that the plugin extends, in this process, and reports what became of each hook.
With ``--yaml`` it looks at a training recipe as well.
"""

import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from packaging.requirements import Requirement

from . import __version__, _autoload
from .errors import UpstreamError
from .training.recipe import Finding


DISTRIBUTION = "chatreid-plugin"
PACKAGES = (
    "llamafactory",
    "torch",
    "torchvision",
    "torchaudio",
    "transformers",
    "datasets",
    "accelerate",
    "peft",
    "trl",
    "deepspeed",
    "gradio",
    "pyarrow",
)


@dataclass(frozen=True, slots=True)
class HookRow:
    """One hook: what it brings, the module it waits for, ``applied``, ``pending`` or ``failed``, and why."""

    name: str
    target: str
    state: str
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """What the doctor found; ``problems`` make the exit code 4, ``warnings`` do not."""

    plugin: str
    python: str
    executable: str
    versions: Mapping[str, str | None]
    autoload_file: str | None
    autoload_active: bool
    switched_off: bool
    hooks: tuple[HookRow, ...]
    torchrun: str | None
    gpus: tuple[str, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    recipe: str | None = None
    findings: tuple[Finding, ...] = ()

    @property
    def faults(self) -> int:
        """How many problems there are with the environment and errors in the recipe."""
        return len(self.problems) + sum(finding.state == "error" for finding in self.findings)

    @property
    def healthy(self) -> bool:
        """Whether there are none."""
        return self.faults == 0

    @property
    def exit_code(self) -> int:
        """0 if healthy, else the code of errors outside this package."""
        return 0 if self.healthy else UpstreamError.exit_code

    def to_json(self) -> str:
        """Return the report as one JSON object."""
        values = asdict(self) | {"healthy": self.healthy}
        if self.recipe is None:
            del values["recipe"], values["findings"]
        return json.dumps(values, indent=2)

    def render(self) -> str:
        """Return the report as text for people."""
        installed = [f"{name} {version}" for name, version in self.versions.items() if version]
        lines = [
            f"chatreid-plugin {self.plugin}, Python {self.python} ({self.executable})",
            f"packages:  {', '.join(installed) or 'none'}",
            f"autoload:  {self.autoload_file or 'no .pth file'}, {'active' if self.autoload_active else 'not active'}"
            + (f", switched off by {_autoload.KILL_SWITCH}" if self.switched_off else ""),
            f"torchrun:  {self.torchrun or 'not on PATH'}",
            f"GPUs:      {', '.join(self.gpus) or 'none'}",
            "hooks:",
            *(f"  {row.state:<8} {row.name} ({row.target}){_add_reason(row.reason)}" for row in self.hooks),
            *(f"warning: {text}" for text in self.warnings),
            *(f"problem: {text}" for text in self.problems),
            *([f"recipe {self.recipe}:"] if self.recipe is not None else []),
            *(f"  {finding.render()}" for finding in self.findings),
            "healthy" if self.healthy else f"{self.faults} problem(s)",
        ]
        return "\n".join(lines)


def _add_reason(reason: str) -> str:
    return f": {reason}" if reason else ""


def examine() -> Report:
    """Look at this environment; never raises for what it finds. Takes as long as LLaMA-Factory's imports."""
    active = is_autoload_active()
    problems = check_bounds(_list_requirements(), find_version)
    # Libraries greet on stdout as they are imported; `--json` promises JSON alone.
    with redirect_stdout(sys.stderr):
        _autoload.install()
        import_problems = _import_targets(_autoload.TARGETS)
        hooks = _list_hooks()
        gpus = _list_gpus()
    problems += import_problems + check_hooks(hooks, _autoload.is_switched_off())
    torchrun = shutil.which("torchrun")
    return Report(
        plugin=__version__,
        python=platform.python_version(),
        executable=sys.executable,
        versions={name: find_version(name) for name in PACKAGES},
        autoload_file=find_autoload_file(),
        autoload_active=active,
        switched_off=_autoload.is_switched_off(),
        hooks=hooks,
        torchrun=torchrun,
        gpus=gpus,
        problems=tuple(problems),
        warnings=tuple(_check_autoload(active) + check_torchrun(torchrun, sysconfig.get_path("scripts"))),
    )


def examine_with_recipe(path: Path, overrides: Sequence[str], compare: Path | None) -> Report:
    """Look at this environment and at a training recipe; the recipe only where LLaMA-Factory can be imported.

    Args:
        path: the recipe's YAML file.
        overrides: ``key=value``, as ``llamafactory-cli train`` takes them.
        compare: an evaluation or inference file whose image settings and system prompt have to be the recipe's.
    """
    report = examine()
    if any(row.state != "applied" for row in report.hooks):
        advice = "Repair the environment first"
        findings = [Finding("arguments", "error", "not looked at: the plugin is not at work here", advice)]
    else:
        with redirect_stdout(sys.stderr):
            from .training.recipe_checks import examine_recipe

            findings = examine_recipe(path, overrides, compare)
    return replace(report, recipe=str(path), findings=tuple(findings))


def find_version(name: str) -> str | None:
    """Return the installed version of a distribution, None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _list_requirements() -> list[str]:
    try:
        return importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:  # PYTHONPATH without metadata: nothing states the bounds
        return []


def check_bounds(requirements: Iterable[str], find: Callable[[str], str | None]) -> list[str]:
    """Return one message for each requirement (extras aside) that the installed versions do not meet."""
    problems: list[str] = []
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = find(requirement.name)
        if version is None:
            problems.append(f"{requirement.name} is not installed; install it with pip: '{requirement}'")
        elif not requirement.specifier.contains(version, prereleases=True):
            problems.append(
                f"{requirement.name} {version} is outside the tested range; install it with pip: '{requirement}'"
            )
    return problems


def find_autoload_file() -> str | None:
    """Return the ``.pth`` file in the folders of the installed packages, None if there is none."""
    for folder in dict.fromkeys([sysconfig.get_path("purelib"), *sys.path]):
        path = Path(folder) / "chatreid_autoload.pth"
        if path.is_file():
            return str(path)
    return None


def is_autoload_active() -> bool:
    """Tell whether a new interpreter, such as torchrun starts, loads the plugin by itself."""
    command = [sys.executable, "-c", "import sys; sys.exit('chatreid_plugin._autoload' not in sys.modules)"]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def _check_autoload(active: bool) -> list[str]:
    warnings: list[str] = []
    if _autoload.is_switched_off():
        switch = f"{_autoload.KILL_SWITCH}={os.environ[_autoload.KILL_SWITCH]}"
        warnings.append(f"{switch} switches the plugin off; unset it to use the plugin")
    if not active:
        warnings.append(
            "a new Python process does not load the plugin: llamafactory-cli will refuse chatreid_* keys. Install "
            "with pip into the environment, or use python -m chatreid_plugin train"
        )
    return warnings


def check_torchrun(torchrun: str | None, scripts: str) -> list[str]:
    """Return a warning unless the torchrun on PATH, which LLaMA-Factory starts, is this environment's."""
    if torchrun is None:
        return [f"torchrun is not on PATH, training on several GPUs will fail: add {scripts} to PATH"]
    if os.path.realpath(Path(torchrun).parent) != os.path.realpath(scripts):
        return [
            f"torchrun on PATH is {torchrun}, of another environment: training on several GPUs would run there, "
            f"without the plugin. Put {scripts} first on PATH"
        ]
    return []


def _import_targets(targets: Iterable[str]) -> list[str]:
    for name in targets:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever an environment's broken package raises is the finding
            return [f"{name} cannot be imported: {type(error).__name__}: {error}"]
    return []


def _list_hooks() -> tuple[HookRow, ...]:
    try:
        from .training.hooks import STATUS
    except Exception as error:  # half an installation is a finding as well
        reason = f"{type(error).__name__}: {error}"
        return (HookRow("all hooks", "chatreid_plugin.training.hooks", "failed", reason),)
    rows: list[HookRow] = []
    for target, (name, _) in _autoload.TARGETS.items():
        found = STATUS.get(target)
        rows.append(HookRow(name, target, found.state if found else "pending", found.reason if found else ""))
    return tuple(rows)


def check_hooks(hooks: Iterable[HookRow], switched_off: bool) -> list[str]:
    """Return one message for each hook that failed, or whose module was loaded past it."""
    problems: list[str] = []
    for hook in hooks:
        error = _autoload.ERRORS.get(hook.target, "")
        if hook.state == "failed":
            problems.append(f"hook failed: {hook.name} ({hook.target}){_add_reason(hook.reason or error)}")
        elif hook.state == "pending" and hook.target in sys.modules and not switched_off:
            reason = error or "another package's import hook loaded the module past the plugin"
            problems.append(f"hook not applied: {hook.name} ({hook.target}): {reason}")
    return problems


def _list_gpus() -> tuple[str, ...]:
    try:
        cuda = importlib.import_module("torch").cuda
        return tuple(str(cuda.get_device_name(index)) for index in range(cuda.device_count()))
    except Exception as error:  # a driver that does not fit raises from deep inside torch
        return (f"unknown ({type(error).__name__}: {error})",)
