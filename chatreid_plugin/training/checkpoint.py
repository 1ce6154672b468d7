"""Checkpoints on disk, before LLaMA-Factory loads one: whole, swapped, and the one that an adapter was trained on.

The decoder swap takes vision tensors from one checkpoint and everything else from another, as a new folder: a folder
(not a change to a loaded model) works unchanged under DDP, ZeRO-3, FSDP and Ray, and can be inspected.
"""

import shutil
from collections.abc import Collection, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from llamafactory.extras import logging
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..checkpoints import (
    ADAPTER_CONFIG,
    INDEX,
    describe_other_base,
    find_base,
    find_weight_files,
    find_weights_entry,
    has_weights,
    open_weights,
    read_shapes,
)
from ..errors import ConfigError, UpstreamError
from ..printing import say
from ..shards import open_folder_atomically, read_json, write_json


MARKER = "chatreid_composed.json"
# Inside the output folder of Stage 2.
COMPOSED_FOLDER = "chatreid_initial"
COPIED_SUFFIXES = (".json", ".txt", ".jinja", ".model")


def is_hub_name(name: str) -> bool:
    """Return whether a name is of the form ``owner/model`` and no path."""
    return not Path(name).is_absolute() and not name.startswith(".") and name.count("/") == 1


def find_local_checkpoint(name: str, model_args: Any, key: str) -> Path:
    """Return the folder of a checkpoint: a local path as it is, a hub name after downloading it.

    Raises:
        ConfigError: neither a folder nor a hub name.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if not is_hub_name(name):
        raise ConfigError(f"{key}: {name} is not a folder.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=model_args.model_revision, cache_dir=model_args.cache_dir))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(f"{key}: {name} is neither a folder nor a hub model that can be fetched: {error}") from None


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

    transformers fills what is missing with random numbers, and one line in a long report says so: a run would train,
    and a swap would hand on, a model that is new in part.
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


def match_vision_tensors(encoder: Path, decoder: Path, projector: str) -> dict[str, str]:
    """Return decoder tensor name -> encoder tensor name for all tensors that the swap replaces.

    Raises:
        ConfigError: another architecture, other tensors or other shapes.
    """
    stored = [read_shapes(folder) for folder in (encoder, decoder)]
    kinds = [read_json(folder / "config.json").get("model_type") for folder in (encoder, decoder)]
    if kinds[0] != kinds[1]:
        raise ConfigError(f"The encoder {encoder} is a {kinds[0]}, the decoder {decoder} a {kinds[1]}: cannot swap.")
    found: list[dict[str, str]] = []
    shapes: list[dict[str, tuple[int, ...]]] = []
    for folder, every in zip((encoder, decoder), stored, strict=True):
        tensors = {suffix: name for name in every if (suffix := find_vision_suffix(name)) is not None}
        if not tensors:
            raise ConfigError(f"{folder} has no vision tensors (visual.*): it is not a vision-language checkpoint.")
        found.append(tensors)
        shapes.append({suffix: every[name] for suffix, name in tensors.items()})
    different = sorted(s for s in found[0].keys() | found[1].keys() if shapes[0].get(s) != shapes[1].get(s))
    if different:
        first = different[0]
        raise ConfigError(
            f"The vision encoders do not fit: {len(different)} tensor(s) differ, first visual.{first} with shape "
            f"{shapes[0].get(first, 'missing')} in {encoder} and {shapes[1].get(first, 'missing')} in {decoder}."
        )
    return {
        found[1][suffix]: name
        for suffix, name in found[0].items()
        if projector == "encoder" or not suffix.startswith("merger.")
    }


def compute_fingerprint(encoder: Path, decoder: Path, projector: str) -> str:
    """Return a hash over the content of all weight files and configurations that the swap reads."""
    digest = xxhash.xxh3_128(projector.encode())
    for folder in (encoder, decoder):
        for path in [folder / "config.json", *sorted(set(find_weight_files(folder).values()))]:
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
    return digest.hexdigest()


def _write_weights(encoder: Path, decoder: Path, replaced: dict[str, str], output: Path) -> None:
    encoder_files = find_weight_files(encoder)
    decoder_files = find_weight_files(decoder)
    sources = {path: open_weights(path) for path in sorted(set(encoder_files.values()))}
    for path in sorted(set(decoder_files.values())):
        with open_weights(path) as opened:
            tensors = {
                name: sources[encoder_files[replaced[name]]].get_tensor(replaced[name])
                if name in replaced
                else opened.get_tensor(name)
                for name in opened.keys()  # noqa: SIM118 - safe_open is no mapping
            }
        save_file(tensors, output / path.name, metadata={"format": "pt"})


def compose_checkpoint(encoder: Path, decoder: Path, output: Path, projector: str = "encoder") -> Path:
    """Write a checkpoint with ``encoder``'s vision tensors and everything else from ``decoder`` (paper section 3.3).

    One weight file is in memory at a time. The folder is written under a temporary name and renamed; one that was
    composed from the same content is kept as it is.

    Args:
        encoder: checkpoint folder of Stage 1.
        decoder: checkpoint folder of the freshly pre-trained model; configuration, tokenizer and processor too.
        output: the folder to write.
        projector: whose merger to keep, ``encoder`` or ``decoder``.

    Raises:
        ConfigError: a folder without weights, another architecture, other shapes, tensors that are missing or of no
            part of the model; nothing is written then.
        DataError: the disk is full or cannot be written; ``output`` is as it was.
        UpstreamError: ``output`` exists and was not composed by this function.
    """
    replaced = match_vision_tensors(encoder, decoder, projector)
    for folder in (encoder, decoder):
        check_completeness(folder)
    fingerprint = compute_fingerprint(encoder, decoder, projector)
    if output.exists():
        if not (output / MARKER).is_file():
            raise UpstreamError(f"{output} exists and is no composed checkpoint; choose another folder or remove it.")
        if read_json(output / MARKER)["fingerprint"] == fingerprint:
            return output
    with open_folder_atomically(output, failures=(SafetensorError,)) as temporary:
        for path in sorted(decoder.iterdir()):
            stale = path.name == INDEX and path != find_weights_entry(decoder)
            if path.suffix in COPIED_SUFFIXES and path.name != MARKER and not stale:
                shutil.copy2(path, temporary / path.name)
        _write_weights(encoder, decoder, replaced, temporary)
        origin = {"fingerprint": fingerprint, "encoder": str(encoder), "decoder": str(decoder), "projector": projector}
        write_json(temporary / MARKER, origin | {"vision_tensors": len(replaced)})
    say(
        f"chatreid: {len(replaced)} vision tensors from {encoder}, the rest from {decoder} -> {output}",
        aside=True,
    )
    return output


def check_adapter_base(model_args: Any, resumed: Any = None) -> None:
    """Refuse an adapter of a composed checkpoint on another model; warn of any other on a model of another name.

    PEFT puts an adapter on any model of the same shapes. One of Stage 2 was trained on the checkpoint that the decoder
    swap composed; on the model that the swap started from, Stage 1's encoder would be lost without a word. A composed
    checkpoint that was moved is told by its fingerprint; if the adapter's own is gone, any composed one is
    taken.

    Args:
        model_args: LLaMA-Factory's arguments.
        resumed: the checkpoint that a run goes on from.

    Raises:
        ConfigError: the model is not what an adapter was trained on; names that one.
    """
    logger: Any = logging.get_logger(__name__)  # LLaMA-Factory adds warning_rank0 and its like to the class
    adapters = [*(model_args.adapter_name_or_path or ()), *([resumed] if isinstance(resumed, str) else ())]
    for adapter in map(Path, adapters):
        if not (adapter / ADAPTER_CONFIG).is_file():
            continue
        if _is_of_this_swap(adapter, model_args.model_name_or_path):
            continue
        warning = describe_other_base(adapter, model_args.model_name_or_path)
        if warning is not None:
            logger.warning_rank0(f"chatreid: {warning}")


def _is_of_this_swap(adapter: Path, model: str) -> bool:
    base = Path(find_base(adapter) or "")
    if base.name != COMPOSED_FOLDER or Path(model).resolve() == base.resolve():
        return False
    wanted, found = _read_fingerprint(base), _read_fingerprint(Path(model))
    if found is None or wanted not in (None, found):
        raise ConfigError(
            f"The adapter {adapter} was trained on {base}, which the decoder swap composed, not on "
            f"{model}. Set model_name_or_path: {base}."
        )
    return True


def _read_fingerprint(folder: Path) -> str | None:
    return read_json(folder / MARKER)["fingerprint"] if (folder / MARKER).is_file() else None
