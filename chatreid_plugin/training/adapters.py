"""The check that an adapter meets the model it was trained on.

PEFT puts an adapter on any model of the same shapes. One of Stage 2 was trained on the checkpoint that the decoder
swap composed; on the model that the swap started from, Stage 1's encoder would be lost without a word.
"""

from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..shards import read_json
from .checkpoint import COMPOSED_FOLDER, MARKER


ADAPTER_CONFIG = "adapter_config.json"


def _read_fingerprint(folder: Path) -> str | None:
    return read_json(folder / MARKER)["fingerprint"] if (folder / MARKER).is_file() else None


def check_adapter_base(model_args: Any) -> None:
    """Refuse an adapter of a composed checkpoint on another model.

    A composed checkpoint that was moved is told by its fingerprint; if the adapter's own is gone, any composed one is
    taken.

    Raises:
        ConfigError: the model is not what the first adapter was trained on; names that one.
    """
    adapters: list[str] = model_args.adapter_name_or_path or []
    if not adapters or not (Path(adapters[0]) / ADAPTER_CONFIG).is_file():
        return
    base = Path(read_json(Path(adapters[0]) / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
    model = Path(model_args.model_name_or_path)
    if base.name != COMPOSED_FOLDER or model.resolve() == base.resolve():
        return
    wanted, found = _read_fingerprint(base), _read_fingerprint(model)
    if found is None or wanted not in (None, found):
        raise ConfigError(
            f"The adapter {adapters[0]} was trained on {base}, which the decoder swap composed, not on "
            f"{model_args.model_name_or_path}. Set model_name_or_path: {base}."
        )
