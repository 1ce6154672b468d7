"""The system prompt of a run: recorded with what it trains, taken up by what goes on from there.

Stock LLaMA-Factory forgets ``default_system`` with the run; the model would be asked in other words later.
"""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..system_prompts import read_system_prompt, write_system_prompt
from ..tasks import find_default_system
from .recipe import Finding, Recipe, read_values
from .recipe_model import TEMPLATE_FAMILIES


# On the training arguments, which are all that a callback is given.
ATTRIBUTE = "chatreid_system_prompt"


def find_prompt(data_args: Any) -> str | None:
    """Return the system prompt that a run's conversations begin with, None where the template is not ours."""
    if data_args.template not in TEMPLATE_FAMILIES:
        return None
    default = find_default_system(TEMPLATE_FAMILIES[data_args.template][0])
    return default if data_args.default_system is None else data_args.default_system


def read_recorded(model: str, adapters: str | list[str] | None) -> str | None:
    """Return what the last adapter, or the model if there is none, was trained with; None if it does not say."""
    names = adapters.split(",") if isinstance(adapters, str) else adapters
    return read_system_prompt(Path(names[-1] if names else model))


def take_recorded_prompt(model_args: Any, data_args: Any) -> None:
    """Ask a model in the words that it was trained in, unless the user gives others."""
    if find_prompt(data_args) is not None and data_args.default_system is None:
        data_args.default_system = read_recorded(model_args.model_name_or_path, model_args.adapter_name_or_path)


class PromptRecord(TrainerCallback):
    """Writes the record into every checkpoint and, before the model is saved there, into the output folder."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete the checkpoint that has just been saved."""
        self._write(args, Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete the final model."""
        self._write(args, Path(args.output_dir))

    def _write(self, args: Any, folder: Path) -> None:
        prompt = getattr(args, ATTRIBUTE, None)
        if args.should_save and prompt is not None:
            write_system_prompt(folder, prompt)


def check_system_prompt(recipe: Recipe, compare: Path | None = None) -> list[Finding]:
    """Compare the recipe's system prompt with the model's own training and with an inference file.

    Args:
        recipe: the recipe.
        compare: an evaluation file, or an inference file of LLaMA-Factory.
    """
    own = find_prompt(recipe.data)
    if own is None:
        return []
    findings: list[Finding] = []
    before = read_recorded(recipe.model.model_name_or_path, recipe.model.adapter_name_or_path)
    if before not in (None, own):
        found = f"{own!r} here, but {recipe.model.model_name_or_path} was trained with {before!r}"
        findings.append(Finding("system prompt", "warning", found, "Set default_system to the same, unless meant"))
    if compare is not None and compare.is_file():  # check_image_limits reports one that is not there
        values = read_values(compare, [])
        other = _find_other(values, recipe)
        if other != own:
            key = "default_system" if "template" in values else "system_prompt"
            found = f"{own!r} here, {other!r} in {compare}"
            advice = f"Set {key} there to the recipe's default_system"
            findings.append(Finding("system prompt", "error", found, advice))
    return findings or [Finding("system prompt", "ok", f"{own!r}")]


def _find_other(values: dict[str, Any], recipe: Recipe) -> str | None:
    """Return the system prompt of an evaluation or inference file; it takes the recorded one of a model."""
    for key in ("system_prompt", "default_system"):
        if values.get(key) is not None:
            return str(values[key])
    name = values.get("adapter_name_or_path") or values.get("model_name_or_path")
    if name is None or not Path(str(name)).is_dir():
        return find_prompt(recipe.data)  # not trained yet: the record will be the recipe's
    recorded = read_system_prompt(Path(str(name)))
    return find_default_system(TEMPLATE_FAMILIES[recipe.data.template][0]) if recorded is None else recorded
