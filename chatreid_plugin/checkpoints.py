"""Checkpoint folders as they lie on disk: weights, adapters, and the words that a model was trained in.

Whoever reads a checkpoint by itself (resuming, the decoder swap, ``doctor``) asks here which files are its weights, in
the order in which transformers looks for them: a folder that was once sharded and now holds one file keeps its old
index, and whoever followed that one would read other weights.

PEFT puts an adapter on any model of the same shapes, leaves out tensors that have no place in it, and imports a module
that an adapter's configuration names. Adapters are passed on between strangers and moved between folders, so all three
are looked at, in training, export and evaluation alike.

LLaMA-Factory's ``default_system`` takes the place of the template's own words, and no file of a checkpoint says so.
Training records them beside the weights; evaluation, ``chatreid serve`` and LLaMA-Factory's own inference read them.
"""

from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open

from .errors import ConfigError, DataError
from .shards import read_json, write_json
from .upstream import get_upstream


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# In config.json: the file to read instead of the two above.
EXPLICIT_KEY = "transformers_weights"
ADAPTER_CONFIG = "adapter_config.json"
PROMPT_RECORD = "chatreid_training.json"


def open_weights(path: Path) -> Any:
    """Open a safetensors file.

    Raises:
        ConfigError: it is missing, or no such file.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is not a readable safetensors file (missing or cut short?): {error}") from None


def find_weights_entry(folder: Path) -> Path | None:
    """Return the one file that transformers starts from: weights or an index; None if there are no safetensors.

    transformers 5.5.4 (modeling_utils.py, ``_get_resolved_checkpoint_files``) takes the file that the configuration
    names, else ``model.safetensors``, else the index.
    """
    config = _read_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    explicit = config.get(EXPLICIT_KEY)
    names = (WEIGHTS, INDEX) if explicit is None else (str(explicit),)
    return next((folder / name for name in names if (folder / name).is_file()), None)


def has_weights(folder: Path) -> bool:
    """Return whether a folder holds the safetensors weights of a whole model."""
    return folder.is_dir() and find_weights_entry(folder) is not None


def find_weight_files(folder: Path) -> dict[str, Path]:
    """Return tensor name -> safetensors file of a checkpoint folder.

    Raises:
        ConfigError: the folder is missing, has no safetensors weights or one that cannot be read.
    """
    if not folder.is_dir():
        raise ConfigError(f"Checkpoint folder {folder} does not exist.")
    entry = find_weights_entry(folder)
    if entry is None:
        found = ", ".join(sorted(item.name for item in folder.iterdir())) or "nothing"
        raise ConfigError(
            f"{folder} has no safetensors weights ({WEIGHTS} or {INDEX}); found: {found}. If it holds DeepSpeed "
            "shards, consolidate them first: python zero_to_fp32.py . OUTPUT --safe_serialization."
        )
    if entry.suffix == ".json":
        return {tensor: folder / file for tensor, file in _read_index(entry).items()}
    with open_weights(entry) as tensors:
        return dict.fromkeys(tensors.keys(), entry)


def _read_object(path: Path) -> dict[str, Any]:
    content: Any = read_json(path)
    return cast(dict[str, Any], content) if isinstance(content, dict) else {}


def _read_index(path: Path) -> dict[str, str]:
    names: Any = _read_object(path).get("weight_map")
    if not names or not isinstance(names, dict):
        raise ConfigError(f"{path} has no weight_map: it is no index of safetensors files.")
    for file in cast(dict[str, Any], names).values():
        if not isinstance(file, str) or Path(file).name != file:
            raise ConfigError(f"{path} names {file!r}, which is no file beside it.")
    return cast(dict[str, str], names)


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return tensor name -> shape of a checkpoint, from the headers of its safetensors files.

    Raises:
        ConfigError: no safetensors weights, or a file that is missing, cut short or without a tensor of the index.
    """
    files = find_weight_files(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(set(files.values())):
        with open_weights(path) as opened:
            shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    missing = sorted(files.keys() - shapes.keys())
    if missing:
        raise ConfigError(f"{folder}: {len(missing)} tensor(s) of its index are in no file, first {missing[0]}")
    return shapes


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


def write_system_prompt(folder: Path, prompt: str) -> None:
    """Record the system prompt in a checkpoint's or an adapter's folder; empty where training had none."""
    write_json(folder / PROMPT_RECORD, {"system_prompt": prompt})


def read_system_prompt(folder: Path) -> str | None:
    """Return the recorded system prompt, None where there is no record: of a hub's model, or of an older version.

    Raises:
        DataError: the file cannot be read, or holds no system prompt.
    """
    path = folder / PROMPT_RECORD
    if not path.is_file():
        return None
    content: object = read_json(path)
    prompt = cast(dict[str, object], content).get("system_prompt") if isinstance(content, dict) else None
    if not isinstance(prompt, str):
        raise DataError(f"{path} holds no system_prompt. Remove it and set system_prompt in the evaluation.")
    return prompt
