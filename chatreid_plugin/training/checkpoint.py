"""The decoder swap on disk: vision tensors from one checkpoint, everything else from another, as a new folder.

A folder (not a change to a loaded model) works unchanged under DDP, ZeRO-3, FSDP and Ray, and can be inspected.
"""

import shutil
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..errors import ConfigError, UpstreamError
from ..printing import say
from ..shards import open_folder_atomically, read_json, write_json
from ..weight_files import INDEX, find_weight_files, find_weights_entry, open_weights, read_shapes
from .completeness import check_completeness, find_vision_suffix


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


def _match_vision_tensors(encoder: Path, decoder: Path, projector: str) -> dict[str, str]:
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
    replaced = _match_vision_tensors(encoder, decoder, projector)
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
