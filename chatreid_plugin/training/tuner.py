"""What the plugin adds to LLaMA-Factory's runs and exports, inside ``llamafactory.train.tuner``."""

from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from ..system_prompts import write_system_prompt
from ..upstream import get_upstream
from .compat import get_function
from .cutoff import ThinnedReport
from .prompt_record import PromptRecord, find_prompt


def extend_tuner(module: ModuleType) -> None:
    """Add our callbacks to every trainer, and the record of the system prompt to an exported model."""
    training_function = get_function(module, "_training_function")
    export_model = get_function(module, "export_model")
    read_args, get_infer_args = (get_upstream(module, name) for name in ("read_args", "get_infer_args"))

    @wraps(training_function)
    def train_with_callbacks(config: dict[str, Any]) -> None:
        callbacks = [*(config.get("callbacks") or ()), ThinnedReport(), PromptRecord()]
        training_function(config | {"callbacks": callbacks})

    @wraps(export_model)
    def export_with_record(args: Any = None) -> None:
        values = read_args(args)
        export_model(values)
        model_args, data_args, *_ = get_infer_args(values)
        prompt = find_prompt(data_args)
        if prompt is not None:
            write_system_prompt(Path(model_args.export_dir), prompt)

    module._training_function = train_with_callbacks  # type: ignore[attr-defined]
    module.export_model = export_with_record  # type: ignore[attr-defined]
