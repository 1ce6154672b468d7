"""Load a checkpoint as LLaMA-Factory leaves it: a full model, or a LoRA adapter that is merged into its base."""

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from ...checkpoints import (
    ADAPTER_CONFIG,
    describe_other_base,
    find_base,
    find_weight_files,
    find_weights_entry,
    guard_loading,
    guard_peft,
    read_system_prompt,
)
from ...errors import ChatReIDError, ConfigError, UpstreamError
from ...tasks import find_default_system
from ..settings import ModelSettings
from .decoder import IMAGE_PAD
from .encoder import is_out_of_memory


FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
# Owner and model; the hub's few names without an owner are of no family here.
HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+")
LOADING_ERRORS = (OSError, ValueError, RuntimeError, SafetensorError)

logger = logging.getLogger(__name__)


def find_checkpoint(settings: ModelSettings) -> tuple[str, str | None]:
    """Return (base model, adapter or None); a ``model_name_or_path`` with an adapter's file names its base there.

    Raises:
        ConfigError: two adapters are named, or an adapter's file names no base model.
        DataError: an adapter's file cannot be read.
    """
    name, adapter = str(settings.model_name_or_path), settings.adapter_name_or_path
    file = Path(name) / ADAPTER_CONFIG
    if not file.is_file():
        return name, adapter
    if adapter is not None:
        raise ConfigError(
            f"model.model_name_or_path: {name} is an adapter itself; with "
            "model.adapter_name_or_path it has to be the base model."
        )
    base = find_base(Path(name))
    if base is None:
        raise ConfigError(
            f"{file} names no base model. Set model.model_name_or_path to the base model and "
            "model.adapter_name_or_path to this folder."
        )
    if (Path(base) / ADAPTER_CONFIG).is_file():
        raise ConfigError(f"{file} names the adapter {base} as its base. Merge that one first, and name the result.")
    return base, name


def find_system_prompt(settings: ModelSettings, family: str) -> str:
    """Return the settings' system prompt, else the one that the checkpoint or its adapter was trained with.

    Raises:
        DataError: its record cannot be read.
    """
    if settings.system_prompt is not None:
        return settings.system_prompt
    name, adapter = find_checkpoint(settings)
    recorded = read_system_prompt(Path(adapter or name))
    return find_default_system(family) if recorded is None else recorded


def pick_device(name: str) -> str:
    """Return the device of ``device``: ``auto`` is a GPU where there is one.

    Raises:
        ConfigError: this machine does not have it.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    here = ["cpu"]
    if torch.cuda.is_available():
        here += ["cuda", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        here.append("mps")
    if name not in here:
        raise ConfigError(
            f"model.device: {name} is not on this machine, which has {', '.join(here)}. Set one, or auto."
        )
    return name


def check_name(key: str, name: str, hint: str = "") -> None:
    """Refuse what is no folder here and cannot be a model of the hub either, so that the hub need not be asked.

    Raises:
        ConfigError: names the key; ``hint`` is added.
    """
    path = Path(name)
    if path.is_dir():
        return
    if path.exists():
        raise ConfigError(f"{key}: {name} is a file. Name the folder of the checkpoint, not a file in it.{hint}")
    if not HUB_NAME.fullmatch(name) or Path(path.parts[0]).is_dir():
        raise ConfigError(f"{key}: the folder {name} does not exist.{hint}")
    logger.warning(
        "%s: there is no folder %s; asking the Hugging Face hub (half a minute without network).", key, name
    )


def explain_failure(name: str, error: Exception) -> str:
    """Say why a checkpoint cannot be loaded: the damaged file if there is one, else what transformers says."""
    if "trust_remote_code" in str(error):
        return "it asks for Python code of its own to be run (auto_map in its configuration), which is never done."
    for file in _list_weight_files(Path(name)):
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as damage:
            return f"{file} is damaged or cut off ({damage}). Copy it again."
    return str(error) if Path(name).is_dir() else f"it is no folder here, and not to be had from the hub: {error}"


def _list_weight_files(folder: Path) -> list[Path]:
    """Return the files that are read, not others that lie beside them; an adapter's if there are no others."""
    entry = find_weights_entry(folder) if folder.is_dir() else None
    if entry is None or entry.suffix == ".safetensors":
        return [entry] if entry else sorted(folder.glob("*.safetensors"))
    return sorted(set(find_weight_files(folder).values()))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on its device, its processor, and hashes of all weights and of what is computed with them."""

    model: Any
    processor: Any
    weights: str
    configuration: str


def load_checkpoint(settings: ModelSettings) -> Checkpoint:
    """Return a model in evaluation mode on its device, its adapter merged.

    Raises:
        ConfigError: the device, the checkpoint or its adapter is missing, has no weights or is of no known family.
        UpstreamError: there is no memory for the model.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    name, adapter = find_checkpoint(settings)
    device = pick_device(settings.device)
    named = adapter is not None and settings.adapter_name_or_path is None
    hint = f" It is the base that {adapter} names; say where it is now with model.model_name_or_path." if named else ""
    check_name("model.model_name_or_path", name, hint)
    if adapter is not None:
        check_name("model.adapter_name_or_path", adapter)
        warning = describe_other_base(Path(adapter), name)
        if warning is not None:
            logger.warning("%s", warning)
    guard_loading(name)
    part = "configuration"
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if config.model_type not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise ConfigError(
                f"model.model_name_or_path: {name} is a {config.model_type}; this backend scores {known}."
            )
        part = "weights or the quantization_config"
        result: Any = AutoModelForImageTextToText.from_pretrained(
            name, dtype=settings.dtype, output_loading_info=True, trust_remote_code=False
        )
        part = "tokenizer or the image processor"
        processor: Any = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        _check_tokenizer(processor.tokenizer)
    except ChatReIDError:
        raise
    # The tokenizers' library raises Exception itself, and a damaged file whatever its reader meets.
    except Exception as error:
        _refuse_too_large(name, error)
        why = explain_failure(name, error)
        if not isinstance(error, LOADING_ERRORS):
            why = f"the {part} is damaged ({type(error).__name__}: {why}). Copy or save the checkpoint again."
        raise ConfigError(f"model.model_name_or_path: {name} cannot be loaded: {why}{hint}") from None
    model, loaded = result
    refuse_misfits("model.model_name_or_path", name, loaded)
    if adapter is not None:
        model = _merge_adapter(model, adapter)
    try:
        model = model.to(device).eval()
    except RuntimeError as error:
        _refuse_too_large(name, error)
        raise
    fingerprints = compute_weights_fingerprint(model), compute_configuration_fingerprint(model, processor)
    return Checkpoint(model, processor, *fingerprints)


def _check_tokenizer(tokenizer: Any) -> None:
    """Refuse the empty tokenizer that transformers makes where a checkpoint has no tokenizer's files."""
    if IMAGE_PAD not in tokenizer.get_vocab():
        raise ValueError(
            f"its tokenizer does not know {IMAGE_PAD}. Copy tokenizer.json and tokenizer_config.json too."
        )


def refuse_misfits(key: str, name: str, loaded: dict[str, Any]) -> None:
    """Refuse a checkpoint whose tensors are not the model's: transformers fills what is missing with random numbers.

    Tied weights, which are in the file once, do not count as missing there.

    Args:
        key: the YAML key that names the checkpoint.
        name: the checkpoint.
        loaded: what ``from_pretrained`` returns with ``output_loading_info``.

    Raises:
        ConfigError: names the key and the first tensor.
    """
    faults = {"lacks": loaded["missing_keys"], "holds, beyond what the model has,": loaded["unexpected_keys"]}
    for fault, tensors in faults.items():
        if tensors:
            raise ConfigError(
                f"{key}: {name} {fault} {len(tensors)} tensor(s), first {min(tensors)}. Copy or save the "
                "checkpoint again; its config.json may be of another model."
            )


def _refuse_too_large(name: str, error: Exception) -> None:
    if is_out_of_memory(error):
        raise UpstreamError(
            f"There is no memory for the model {name}: {error} Set model.dtype: bfloat16, or take a "
            "device with more memory."
        ) from None


def _merge_adapter(model: Any, adapter: str) -> Any:
    from peft import PeftModel

    guard_peft()
    try:
        merged: Any = PeftModel.from_pretrained(model, adapter)
        return merged.merge_and_unload(safe_merge=True)
    except ChatReIDError:
        raise
    except Exception as error:  # as in load_checkpoint
        _refuse_too_large(adapter, error)
        why = explain_failure(adapter, error)
        raise ConfigError(f"model.adapter_name_or_path: {adapter} cannot be merged into the model: {why}") from None


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
