"""All checks of a recipe, one after another: what ``chatreid doctor --yaml`` runs."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ..errors import ChatReIDError
from .pitfalls import check_evaluation, check_mixing, check_packing, check_records, check_streaming
from .prompt_record import check_system_prompt
from .recipe import Finding, Recipe, parse_recipe
from .recipe_arguments import (
    check_deepspeed,
    check_eager,
    check_image_limits,
    check_lazy,
    check_output,
    check_stage,
    check_swap,
    check_template,
    check_tokenized_path,
)
from .recipe_data import check_datasets
from .recipe_model import check_checkpoints, check_memory


CHECKS: tuple[Callable[[Recipe], list[Finding]], ...] = (
    check_stage,
    check_swap,
    check_template,
    check_records,
    check_evaluation,
    check_packing,
    check_mixing,
    check_streaming,
    check_lazy,
    check_eager,
    check_tokenized_path,
    check_deepspeed,
    check_output,
    check_checkpoints,
    check_memory,
    check_datasets,
)


def examine_recipe(path: Path, overrides: Sequence[str] = (), compare: Path | None = None) -> list[Finding]:
    """Return what every check finds; loads no model and writes nothing.

    Args:
        path: the recipe's YAML file.
        overrides: ``key=value``, as ``llamafactory-cli train`` takes them.
        compare: an evaluation or inference file whose image settings and system prompt have to be the recipe's.
    """
    try:
        recipe = parse_recipe(path, overrides)
    except ChatReIDError as error:
        return [Finding("arguments", "error", str(error), "Correct this first; the other checks need it")]
    findings = [Finding("arguments", "ok", "LLaMA-Factory accepts all keys and values")]
    for check in (*CHECKS, *(partial(check, compare=compare) for check in (check_image_limits, check_system_prompt))):
        try:
            findings += check(recipe)
        except ChatReIDError as error:
            findings.append(Finding(_name(check), "error", str(error)))
    return findings


def _name(check: Callable[..., list[Finding]]) -> str:
    function = check.func if isinstance(check, partial) else check
    return function.__name__.removeprefix("check_").replace("_", " ")
