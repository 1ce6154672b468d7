"""Whether a checkpoint's tensors are exactly its model's, whatever version of transformers wrote it.

transformers fills what is missing with random numbers, and one line in a long report says so: a run would train, and a
swap would hand on, a model that is new in part.
"""

from collections.abc import Collection, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..weight_files import has_weights, read_shapes


def find_vision_suffix(tensor: str) -> str | None:
    """Return what follows ``visual.`` in a tensor's name, or None for a decoder tensor.

    transformers 4.52-4.57 may store ``model.visual.*``, other versions ``visual.*``.
    """
    head, mark, suffix = tensor.partition("visual.")
    return suffix if mark and head in ("", "model.") else None


def find_model_name(stored: str, names: Collection[str]) -> str | None:
    """Return the parameter's name in the model for its name in a file of any transformers from 4.52 to 5.x."""
    suffix = find_vision_suffix(stored)
    if suffix is not None:
        candidates = [stored, f"model.visual.{suffix}", f"visual.{suffix}"]
    elif stored.startswith("model.language_model."):
        candidates = [stored, "model." + stored.removeprefix("model.language_model.")]
    else:
        candidates = [stored, "model.language_model." + stored.removeprefix("model.")]
    return next((name for name in candidates if name in names), None)


def match_names(model: torch.nn.Module, folder: Path, advice: str) -> dict[str, str]:
    """Return tensor name on disk -> name in the model, for all tensors of a checkpoint.

    Args:
        model: the model, or one of its kind without data (device ``meta``).
        folder: the checkpoint.
        advice: what to do about one that does not fit.

    Raises:
        ConfigError: a tensor is of no parameter, a parameter is in no file, or a shape differs.
    """
    targets = model.state_dict()
    # Tied weights, which are in the file once, have one name here.
    missing = {name for name, _ in model.named_parameters()}
    computed = {name for name, _ in model.named_buffers()} - targets.keys()  # some versions have saved them
    names: dict[str, str] = {}
    for stored, shape in read_shapes(folder).items():
        name = find_model_name(stored, targets)
        if name is not None and tuple(targets[name].shape) == shape:
            names[stored] = name
        elif name is not None or find_model_name(stored, computed) is None:
            raise ConfigError(f"{folder}: {stored} with shape {shape} is no tensor of the model. {advice}")
    missing -= set(names.values())
    if missing:
        raise ConfigError(f"{folder} lacks {len(missing)} of the model's parameters, first {min(missing)}. {advice}")
    return names


@contextmanager
def _without_deepspeed() -> Generator[None]:
    """Make models in this process alone.

    Under ZeRO-3 transformers shares every new module out among all processes, and one that makes a model by itself
    waits for the others, which wait for it.
    """
    from transformers.integrations import deepspeed

    kept = deepspeed._hf_deepspeed_config_weak_ref  # type: ignore[attr-defined]
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept  # type: ignore[attr-defined]


def check_completeness(folder: Path) -> None:
    """Refuse a vision-language checkpoint in safetensors whose tensors are not those of its own ``config.json``.

    Reads the headers of the files alone, and makes the model without data: 0.2 s for 8 billion parameters.

    Raises:
        ConfigError: names the first tensor that is missing or that has no place.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig

    if not has_weights(folder):
        return  # other formats are transformers' own to judge
    try:
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        make: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
        if make is None or getattr(config, "quantization_config", None) is not None:
            return
        with _without_deepspeed(), torch.device("meta"):
            model = make(config)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ConfigError(f"{folder / 'config.json'} describes no model that can be made: {error}") from None
    match_names(model, folder, "Copy or save the checkpoint again; its config.json may be of another model.")
