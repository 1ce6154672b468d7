"""The check that an adapter meets the model it was trained on.

PEFT puts an adapter on any model of the same shapes. One of Stage 2 was trained on the checkpoint that the decoder
swap composed; on the model that the swap started from, Stage 1's encoder would be lost without a word.
"""

from pathlib import Path
from typing import Any

from llamafactory.extras import logging

from ..adapters import ADAPTER_CONFIG, describe_other_base, find_base
from ..errors import ConfigError
from ..shards import read_json
from .checkpoint import COMPOSED_FOLDER, MARKER


def _read_fingerprint(folder: Path) -> str | None:
    return read_json(folder / MARKER)["fingerprint"] if (folder / MARKER).is_file() else None


def check_adapter_base(model_args: Any, resumed: Any = None) -> None:
    """Refuse an adapter of a composed checkpoint on another model; warn of any other on a model of another name.

    A composed checkpoint that was moved is told by its fingerprint; if the adapter's own is gone, any composed one is
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
