"""Which files make up a checkpoint folder's weights, in the order in which transformers looks for them.

Everything that reads a checkpoint by itself (resuming, the decoder swap, its fingerprint, ``doctor``, the search for
the damaged file) asks here: a folder that was once sharded and now holds one file keeps its old index, and whoever
followed that one would read other weights than transformers loads.
"""

from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open

from .errors import ConfigError
from .shards import read_json


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# In config.json: the file to read instead of the two above.
EXPLICIT_KEY = "transformers_weights"


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
