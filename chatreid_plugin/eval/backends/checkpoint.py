"""Load a checkpoint as LLaMA-Factory leaves it: a full model, or a LoRA adapter that is merged into its base."""

import json
from pathlib import Path
from typing import Any, cast

import torch
import xxhash

from ...errors import ConfigError
from ...eval_settings import EvalSettings


FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
ADAPTER_FILE = "adapter_config.json"


def find_checkpoint(settings: EvalSettings) -> tuple[str, str | None]:
    """Return (base model, adapter or None); a ``model_name_or_path`` with an adapter's file names its base there.

    Raises:
        ConfigError: two adapters are named, or an adapter's file cannot be read.
    """
    name, adapter = str(settings.model_name_or_path), settings.adapter_name_or_path
    file = Path(name) / ADAPTER_FILE
    if not file.is_file():
        return name, adapter
    if adapter is not None:
        raise ConfigError(
            f"model_name_or_path: {name} is an adapter itself; with adapter_name_or_path it has to be the base model."
        )
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file} names no base model: {error!r}. Set model_name_or_path to the base model and "
            "adapter_name_or_path to this folder."
        ) from None
    return str(base), name


def pick_device(name: str) -> str:
    """Return the device of ``device``: ``auto`` is a GPU where there is one."""
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def load_checkpoint(settings: EvalSettings) -> tuple[Any, Any]:
    """Return (model in evaluation mode on its device, adapter merged; processor).

    Raises:
        ConfigError: the checkpoint or its adapter is missing, has no weights or is of no known family.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    name, adapter = find_checkpoint(settings)
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise ConfigError(f"model_name_or_path: {name} is a {config.model_type}; this backend scores {known}.")
        model: Any = AutoModelForImageTextToText.from_pretrained(name, dtype=settings.dtype)
        processor: Any = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        hint = f" It is the base that {adapter} names; say where it is now with model_name_or_path." if adapter else ""
        raise ConfigError(f"model_name_or_path: {name} cannot be loaded: {error}{hint}") from None
    if adapter is not None:
        model = _merge_adapter(model, adapter)
    return model.to(pick_device(settings.device)).eval(), processor


def _merge_adapter(model: Any, adapter: str) -> Any:
    from peft import PeftModel

    try:
        merged: Any = PeftModel.from_pretrained(model, adapter)
        return merged.merge_and_unload(safe_merge=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"adapter_name_or_path: {adapter} cannot be merged into the model: {error}") from None


def compute_weights_fingerprint(model: Any) -> str:
    """Return a hash over every tensor's name, shape and whole content: 0.15 s a gigabyte in the host's memory."""
    digest = xxhash.xxh3_128()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def compute_configuration_fingerprint(model: Any, processor: Any) -> str:
    """Return a hash over what is computed with the weights: configuration, image processor and tokenizer.

    Not the chat template: prompts are the plugin's own (``tasks.format_chat_prompt``).
    """
    tokenizer = processor.tokenizer
    words = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
    parts = [_drop_origin(model.config.to_dict()), _drop_origin(processor.image_processor.to_dict()), words]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, default=str).encode())


def _drop_origin(value: Any) -> Any:
    """Return a configuration without what does not change a score: where it was, and which version wrote it."""
    if not isinstance(value, dict):
        return value
    items = cast(dict[str, Any], value).items()
    return {key: _drop_origin(one) for key, one in items if key not in ("_name_or_path", "transformers_version")}
