"""Runs at every interpreter start, through ``chatreid_autoload.pth``: waits for LLaMA-Factory and extends it.

It puts one finder on ``sys.meta_path``. The finder does nothing until one of ``TARGETS`` is imported; when that module
has finished executing, ``training/hooks.py`` is called, before any other module can bind its names. This works in
every process that starts from this environment: torchrun, spawn, fork, Ray. ``CHATREID_PLUGIN=0`` switches it off,
as do ``false``, ``off`` and ``no``.

Only modules that the interpreter has loaded anyway are imported here, since every Python program of the environment
pays for this file, and nothing may escape from it, since every such program would break.
"""

from __future__ import annotations

import os
import sys
from _thread import get_ident


TYPE_CHECKING = False  # the real one is in `typing`, which costs milliseconds at every interpreter start
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any


KILL_SWITCH = "CHATREID_PLUGIN"
# LLaMA-Factory module -> what the plugin brings there, and the function of `training/` that does it, as FILE.FUNCTION.
# Plain strings: this file runs at every interpreter start.
TARGETS = {
    "llamafactory.hparams.parser": ("YAML keys chatreid_* and the decoder swap", "arguments.extend_parser"),
    "llamafactory.data.parser": ("image_root of a data set in dataset_info.json", "dataset_info.keep_image_root"),
    "llamafactory.data.mm_plugin": ("image policy and header-only token counts", "template.register_plugin"),
    "llamafactory.data.converter": ("formatting: chatreid", "loader.register_converter"),
    "llamafactory.data.template": ("template: chatreid", "template.register_templates"),
    "llamafactory.data.collator": ("positions of image tokens in generation", "loader.extend_collator"),
    "llamafactory.data.loader": ("chatreid_lazy: tokenize on the fly", "loader.extend_loader"),
    "llamafactory.model.loader": (
        "check of the trainable parameters, batched vision attention",
        "model.extend_model_loader",
    ),
    "llamafactory.train.callbacks": ("resuming with all weights", "resume.extend_resuming"),
    "llamafactory.train.sft.trainer": ("loss, batches, learning rate of the vision encoder", "trainer.extend_trainer"),
    "llamafactory.train.tuner": ("report of trimmed records, record of the system prompt", "trainer.extend_tuner"),
    "llamafactory.launcher": ("why torchrun stopped, in one line", "hooks.extend_launcher"),
}
ERRORS: dict[str, str] = {}


class HookedLoader:
    """A target module's own loader, which calls the hook after it has executed the module."""

    def __init__(self, original: Loader) -> None:
        self.original = original

    def __getattr__(self, name: str) -> Any:
        # `importlib.util.find_spec` hands this object out before any import; sources and resources are the original's.
        if name == "original":  # not set yet, as while unpickling: asking for it here would recurse for ever
            raise AttributeError(name)
        return getattr(self.original, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Let the original loader create the module."""
        return self.original.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own loader back, execute it, then call the hook."""
        module.__loader__ = self.original
        if module.__spec__ is not None:
            module.__spec__.loader = self.original
        self.original.exec_module(module)
        _apply_hook(module.__name__, module)


class TargetFinder:
    """Finds the modules of ``TARGETS`` as the other finders would, and wraps their loaders."""

    def __init__(self) -> None:
        # Another package's finder may ask every finder, this one included, while this one asks every finder.
        self.searching: set[tuple[int, str]] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a target module with its loader wrapped; None for any other module."""
        if fullname not in TARGETS:
            return None
        search = (get_ident(), fullname)
        if search in self.searching:
            return None
        self.searching.add(search)
        try:
            spec = self._ask_other_finders(fullname, path, target)
        finally:
            self.searching.discard(search)
        if spec is not None and hasattr(spec.loader, "exec_module") and not isinstance(spec.loader, HookedLoader):
            spec.loader = HookedLoader(spec.loader)  # type: ignore[assignment,arg-type]
        return spec

    def _ask_other_finders(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        for finder in list(sys.meta_path):
            find_spec = getattr(finder, "find_spec", None)
            spec = find_spec(fullname, path, target) if find_spec and finder is not self else None
            if spec is not None:
                return spec
        return None


def is_switched_off() -> bool:
    """Tell whether ``CHATREID_PLUGIN`` is ``0``, ``false``, ``off`` or ``no``."""
    return os.environ.get(KILL_SWITCH, "").strip().lower() in ("0", "false", "off", "no")


def is_installed() -> bool:
    """Tell whether the finder is in place in this process."""
    # By name: after a reload of this module the class is another object.
    return any(type(finder).__module__ == __name__ for finder in sys.meta_path)


def install() -> None:
    """Put the finder in place, once; extend target modules that are already loaded. Never raises."""
    try:
        if is_switched_off() or is_installed():
            return
        sys.meta_path.insert(0, TargetFinder())  # type: ignore[arg-type]
        for name in TARGETS:
            if name in sys.modules:
                _apply_hook(name, sys.modules[name])
    except Exception as error:
        _record_error("install", error)


def _apply_hook(name: str, module: ModuleType) -> None:
    try:
        from .training import hooks

        hooks.apply(name, module, *TARGETS[name])
        ERRORS.pop(name, None)
    except Exception as error:
        _record_error(name, error)


def _record_error(name: str, error: Exception) -> None:
    ERRORS[name] = f"{type(error).__name__}: {error}"
    try:
        from .errors import ChatReIDError

        expected = isinstance(error, ChatReIDError)
    except Exception:  # half a package is left, as after a broken uninstall
        expected = False
    # A foreseen fault, such as a LLaMA-Factory that has moved on, is for `chatreid doctor`: people who do not use the
    # plugin in this run need not read about it. Any other is a broken installation, and one line says so.
    if not expected and sys.stderr is not None:
        text = ERRORS[name].splitlines()[0]
        print(f"chatreid_plugin: {name} is not extended ({text}); `chatreid doctor` tells more.", file=sys.stderr)


install()
