"""Settings that LLaMA-Factory 0.9.5 accepts and that crash, or stall, once the data have been read.

``chatreid doctor --yaml`` reports them; a training run with our templates is refused as its arguments are parsed,
before anything is tokenized. Each failure was seen to happen with transformers 5 and datasets 4.0.0.
"""

from pathlib import Path
from typing import Any

from llamafactory.extras import logging

from ..errors import ConfigError
from .recipe import Finding, Recipe
from .recipe_model import check_family


# LLaMA-Factory pads a batch to a multiple of this many tokens (data/collator.py, pad_to_multiple_of).
PADDING = 8


def check_packing(recipe: Recipe) -> list[Finding]:
    """Refuse ``neat_packing`` with a length that the collator pads beyond its position ids."""
    if recipe.data.neat_packing and recipe.cutoff_len % PADDING:
        length = (recipe.cutoff_len // PADDING + 1) * PADDING
        found = f"neat_packing with cutoff_len {recipe.cutoff_len}, no multiple of {PADDING}: shapes do not match"
        return [Finding("packing", "error", found, f"Set cutoff_len: {length}")]
    return [Finding("packing", "ok", "neat_packing" if recipe.data.neat_packing else "no neat_packing")]


def check_mixing(recipe: Recipe) -> list[Finding]:
    """Refuse ``interleave_once``, which the ``datasets`` that LLaMA-Factory 0.9.5 pins (4.0.0) does not know."""
    strategy = recipe.data.mix_strategy
    if strategy == "interleave_once":
        return [
            Finding(
                "mixing", "error", "mix_strategy: interleave_once raises ValueError", "Use concat or interleave_under"
            )
        ]
    return [Finding("mixing", "ok", strategy)]


def check_streaming(recipe: Recipe) -> list[Finding]:
    """Refuse streaming settings that crash: batches cut across images, and no worker to make a shard."""
    if not recipe.data.streaming:
        return [Finding("streaming", "ok", "off")]
    findings: list[Finding] = []
    if recipe.training.accelerator_config.dispatch_batches is not False:
        found = "streaming with dispatch_batches: the first process cuts pixel values at the wrong places"
        findings.append(Finding("streaming", "error", found, "Set accelerator_config: {dispatch_batches: false}"))
    if recipe.training.dataloader_num_workers == 0:
        found = "streaming with dataloader_num_workers: 0 ends with StopIteration"
        findings.append(Finding("streaming", "error", found, "Set dataloader_num_workers: 1 or more"))
    advice = "Prefer chatreid_lazy: true: no cache either, and a known length"
    return findings or [Finding("streaming", "warning", "on: resuming reads everything again", advice)]


def find_whole_reads(recipe: Recipe) -> list[Finding]:
    """Warn of keys that read every record before the first step or after the last, which lazy mode tokenizes then."""
    findings: list[Finding] = []
    readers = {
        "train_sampling_strategy: group_by_length": recipe.training.train_sampling_strategy == "group_by_length",
        "include_effective_tokens_per_second": recipe.finetuning.include_effective_tokens_per_second,
    }
    for key, used in readers.items():
        if used:
            found = f"{key} reads and decodes every record before the first step"
            findings.append(Finding("lazy mode", "warning", found, "Leave it out with chatreid_lazy"))
    return findings


REFUSED = (check_packing, check_mixing, check_streaming, check_family)


def refuse_pitfalls(model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any) -> None:
    """Refuse a training run that is bound to fail, and warn of one that reads everything first.

    Raises:
        ConfigError: names all faults and what to set instead.
    """
    if not training_args.do_train or not str(data_args.template).startswith("chatreid"):
        return
    recipe = Recipe(Path(), {}, model_args, data_args, training_args, finetuning_args)
    findings = [finding for check in REFUSED for finding in check(recipe)]
    faults = [f"{finding.found}. {finding.advice}" for finding in findings if finding.state == "error"]
    if faults:
        raise ConfigError("; ".join(faults) + ".")
    logger: Any = logging.get_logger(__name__)  # LLaMA-Factory adds warning_rank0 and its like to the class
    for finding in find_whole_reads(recipe) if data_args.chatreid_lazy else ():
        logger.warning_rank0(f"chatreid: {finding.found}. {finding.advice}.")
