"""A checkpoint's weights back into the model: all of them, or one error.

transformers 5 writes the decoder of a vision-language model as ``model.layers.*`` (some versions also the tower as
``visual.*``) but holds it as ``model.language_model.layers.*``, and its Trainer loads by name and ignores what does
not fit: a run that is resumed, or that ends with ``load_best_model_at_end``, would go on with the decoder that it has,
and a warning among hundreds of lines. So every Trainer of this process, whatever it trains, is asked first whether
the names on disk are the model's. DeepSpeed and FSDP have files of their own, with the names in memory, and are not
concerned. Reported elsewhere as QwenLM/Qwen3-VL#1763 and modelscope/ms-swift#7947.
"""

from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..adapters import ADAPTER_CONFIG
from ..errors import ConfigError
from ..upstream import get_upstream
from ..weight_files import find_weight_files, has_weights, open_weights
from .compat import get_function
from .completeness import match_names
from .finished_runs import extend_training


def fits_by_name(model: torch.nn.Module, folder: Path) -> bool:
    """Tell whether loading by name leaves nothing out: each tensor is the model's, and each parameter is there.

    Tied weights, which are in the file once, have one name among the parameters.
    """
    stored = find_weight_files(folder).keys()
    return stored <= model.state_dict().keys() and {name for name, _ in model.named_parameters()} <= stored


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Copy all weights of a checkpoint into a model, whatever version of transformers wrote it.

    Raises:
        ConfigError: a tensor is of no parameter, a parameter is in no file, or a shape differs.
    """
    targets, names = model.state_dict(), match_names(model, folder, _advise(folder))
    for path in sorted(set(find_weight_files(folder).values())):
        with open_weights(path) as opened, torch.no_grad():
            for stored in names.keys() & set(opened.keys()):
                targets[names[stored]].copy_(opened.get_tensor(stored))


def _advise(folder: Path) -> str:
    return f"Start from it as a model (model_name_or_path: {folder}) or resume from a checkpoint of this very run."


def _loads_whole(trainer: Any, model: torch.nn.Module, folder: Path) -> bool:
    """Load a checkpoint whose names do not fit; tell whether that was so.

    Raises:
        ConfigError: the checkpoint is of another kind of run, or does not fit the model.
    """
    from peft import PeftModel

    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return False
    adapted = isinstance(model, PeftModel)
    if has_weights(folder):
        if adapted:
            raise ConfigError(f"{folder} holds a whole model, but this run trains an adapter. {_advise(folder)}")
        if fits_by_name(model, folder):
            return False
        load_weights(model, folder)
        return True
    if (folder / ADAPTER_CONFIG).is_file() and not adapted:
        raise ConfigError(
            f"{folder} holds an adapter, which LLaMA-Factory does not resume into this kind of model. Start from it: "
            f"adapter_name_or_path: {folder} instead of resume_from_checkpoint, and another output_dir."
        )
    return False


def extend_resuming(module: ModuleType) -> None:
    """Let every Trainer load a whole checkpoint, or refuse it, and train no step beyond a run's end.

    ``module`` is ``llamafactory.train.callbacks``, which all of LLaMA-Factory's trainers import first.
    """
    import transformers.trainer

    load_checkpoint = get_function(transformers.trainer, "Trainer._load_from_checkpoint")
    load_best = get_function(transformers.trainer, "Trainer._load_best_model")

    @wraps(load_checkpoint)
    def load_whole_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        if not _loads_whole(self, self.model if model is None else model, Path(resume_from_checkpoint)):
            load_checkpoint(self, resume_from_checkpoint, model)

    @wraps(load_best)
    def load_whole_best_model(self: Any) -> None:
        if not _loads_whole(self, self.model, Path(self.state.best_model_checkpoint)):
            load_best(self)

    trainer = get_upstream(transformers.trainer, "Trainer")
    trainer._load_from_checkpoint = load_whole_checkpoint
    trainer._load_best_model = load_whole_best_model
    extend_training(trainer)
