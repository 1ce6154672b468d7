"""Adapters as they lie on disk: what they were trained on, and what PEFT is kept from doing with them.

PEFT puts an adapter on any model of the same shapes, leaves out tensors that have no place in it, and imports a module
that an adapter's configuration names. Adapters are passed on between strangers and moved between folders, so all three
are looked at, in training, export and evaluation alike.
"""

from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from .errors import ConfigError
from .shards import read_json
from .upstream import get_upstream


ADAPTER_CONFIG = "adapter_config.json"


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return an adapter's configuration.

    Raises:
        ConfigError: it is no JSON object.
        DataError: it is missing or no JSON.
    """
    content: Any = read_json(folder / ADAPTER_CONFIG)
    if not isinstance(content, dict):
        raise ConfigError(f"{folder / ADAPTER_CONFIG} holds no JSON object: it is no adapter's configuration.")
    return cast(dict[str, Any], content)


def find_base(folder: Path) -> str | None:
    """Return the model that an adapter was trained on, as its configuration names it; None if it names none."""
    name = read_adapter_config(folder).get("base_model_name_or_path")
    return str(name) if name else None


def names_same_model(first: str, second: str) -> bool:
    """Tell whether two names are of one model: one folder, or a hub's name and a folder of that name."""
    if Path(first).resolve() == Path(second).resolve():
        return True
    either_is_of_the_hub = not (Path(first).exists() and Path(second).exists()) and (
        min(first.count("/"), second.count("/")) == 1 and not (first.startswith(".") or second.startswith("."))
    )
    return either_is_of_the_hub and Path(first).name.lower() == Path(second).name.lower()


def describe_other_base(adapter: Path, model: str) -> str | None:
    """Return a warning if an adapter's folder names another base than ``model``; None otherwise."""
    base = find_base(adapter) if (adapter / ADAPTER_CONFIG).is_file() else None
    if base is None or names_same_model(base, model):
        return None
    return (
        f"The adapter {adapter} was trained on {base}, and is put on {model}. If these are two models, the result is "
        f"wrong without an error. Set model_name_or_path: {base} unless it was only moved."
    )


def guard_loading(name: str) -> None:
    """Guard PEFT before transformers loads a model, which puts on an adapter that lies in the same folder.

    Only where there may be one, since PEFT takes a second to import.
    """
    if not Path(name).is_dir() or (Path(name) / ADAPTER_CONFIG).is_file():
        guard_peft()


def guard_peft() -> None:
    """Let PEFT refuse, in this process, an adapter that names code or that does not fit the model whole.

    Whoever loads the adapter: LLaMA-Factory, the Trainer as it resumes, or the evaluator. Done once.
    """
    peft_model: Any = import_module("peft.peft_model")
    lora: Any = import_module("peft.tuners.lora.model")
    load_adapter = get_upstream(peft_model, "PeftModel.load_adapter")
    dispatch_megatron = get_upstream(lora, "dispatch_megatron")
    if hasattr(load_adapter, "__wrapped__"):
        return

    @wraps(load_adapter)
    def load_whole_adapter(self: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        result = load_adapter(self, model_id, *args, **kwargs)
        # As PeftModel.from_pretrained leaves them out: both are made otherwise.
        missing = [n for n in result.missing_keys if "vblora_vector_bank" not in n and "prompt_encoder" not in n]
        for names, fault in ((missing, "lacks"), (list(result.unexpected_keys), "has no place in the model for")):
            if names:
                raise ConfigError(
                    f"The adapter {model_id} {fault} {len(names)} tensor(s), first {min(names)}. It is of another "
                    "model, or of another version of transformers, or was not copied whole."
                )
        return result

    @wraps(dispatch_megatron)
    def refuse_named_module(target: Any, adapter_name: str, lora_config: Any, **kwargs: Any) -> Any:
        if getattr(lora_config, "megatron_config", None):
            raise ConfigError(
                f"The adapter's {ADAPTER_CONFIG} asks for the Python module {lora_config.megatron_core!r} to be "
                "imported (megatron_config). No adapter of this model needs it: take it from a source that you trust."
            )
        return dispatch_megatron(target, adapter_name, lora_config, **kwargs)

    peft_model.PeftModel.load_adapter = load_whole_adapter
    lora.dispatch_megatron = refuse_named_module
