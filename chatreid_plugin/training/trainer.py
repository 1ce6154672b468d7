"""What the plugin changes in LLaMA-Factory's trainer of instruction tuning."""

from types import ModuleType

from .learning_rates import extend_optimizer
from .resume import extend_resuming


def extend_trainer(module: ModuleType) -> None:
    """Apply both changes inside ``llamafactory.train.sft.trainer``."""
    extend_optimizer(module)
    extend_resuming(module)
