"""Settings that LLaMA-Factory 0.9.5 accepts and that crash, or stall, once the data have been read.

``chatreid doctor --yaml`` reports them; a run with our templates or our records is refused as its arguments are
parsed, before anything is tokenized. Each failure was seen to happen with transformers 5 and datasets 4.0.0.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llamafactory.extras import logging

from ..errors import ChatReIDError, ConfigError
from ..shards import DATASET_INFO, read_json
from .dataset_info import FORMATTING
from .prompt_record import check_system_prompt
from .recipe import Finding, Recipe
from .recipe_inputs import check_dataset_names, check_left_out, check_starting_points
from .recipe_model import TEMPLATE_FAMILIES, check_family, find_right_template


# LLaMA-Factory pads a batch to a multiple of this many tokens (data/collator.py, pad_to_multiple_of).
PADDING = 8


def read_entries(names: Iterable[str] | None, dataset_dir: Any) -> dict[str, dict[str, Any]]:
    """Return data set -> its entry in dataset_info.json, without those that have none; LLaMA-Factory refuses them."""
    try:
        info = read_json(Path(dataset_dir) / DATASET_INFO) if isinstance(dataset_dir, str) else dataset_dir
    except ChatReIDError:  # a data set of the hub, or a mistyped folder
        return {}
    return {name: info[name] for name in dict.fromkeys(names or ()) if isinstance(info.get(name), dict)}


def list_own_datasets(data_args: Any) -> list[str]:
    """Return the data sets of a run that are ChatReID records."""
    entries = read_entries([*(data_args.dataset or ()), *(data_args.eval_dataset or ())], data_args.dataset_dir)
    return [name for name, entry in entries.items() if entry.get("formatting") == FORMATTING]


def check_records(recipe: Recipe) -> list[Finding]:
    """Refuse ChatReID records outside instruction tuning, or with a template that cannot read them.

    Pre-training would learn a literal ``<image>``; other stages and templates stop in the middle of tokenization.
    """
    own, template = list_own_datasets(recipe.data), str(recipe.data.template)
    if not own:
        return []
    several = f" and {len(own) - 1} more" if len(own) > 1 else ""
    findings: list[Finding] = []
    if recipe.finetuning.stage != "sft":
        found = f"stage: {recipe.finetuning.stage} cannot train on ChatReID records ({own[0]}{several})"
        findings.append(Finding("records", "error", found, "Set stage: sft"))
    if template not in TEMPLATE_FAMILIES:
        found = f"template: {template} cannot read ChatReID records ({own[0]}{several})"
        advice = f"Set template: {find_right_template(recipe) or 'chatreid'}"
        findings.append(Finding("records", "error", found, advice))
    return findings or [Finding("records", "ok", f"{len(own)} data set(s) of ChatReID records")]


def check_evaluation(recipe: Recipe) -> list[Finding]:
    """Refuse metrics and predictions that ``eval_on_each_dataset`` breaks; warn of people on both sides."""
    data, training = recipe.data, recipe.training
    findings: list[Finding] = []
    if data.eval_on_each_dataset and data.eval_dataset:
        prefixes = tuple(f"eval_{name}_" for name in data.eval_dataset)
        metric = training.metric_for_best_model
        # Set by load_best_model_at_end and its like as well.
        if metric is not None and not f"eval_{metric.removeprefix('eval_')}".startswith(prefixes):
            found = f"eval_on_each_dataset gives no {metric} for the best model, but one of each data set: KeyError"
            advice = f"Set metric_for_best_model: {prefixes[0]}loss, or eval_on_each_dataset: false"
            findings.append(Finding("evaluation", "error", found, advice))
        if training.do_predict:
            found = "eval_on_each_dataset with do_predict ends in KeyError, once all training is done"
            findings.append(Finding("evaluation", "error", found, "Set eval_on_each_dataset: false"))
    if data.val_size > 0 and list_own_datasets(data):
        found = "val_size holds out records, not people: those it evaluates on are in training as well"
        advice = "Build with validation_share and name the data sets that end in _val as eval_dataset"
        findings.append(Finding("evaluation", "warning", found, advice))
    return findings or [Finding("evaluation", "ok", "on eval_dataset" if data.eval_dataset else "none")]


def check_packing(recipe: Recipe) -> list[Finding]:
    """Refuse ``neat_packing`` where positions and mask come out of different lengths; warn of plain packing."""
    data = recipe.data
    if not data.packing or recipe.finetuning.stage != "sft":
        return [Finding("packing", "ok", "off")]
    if not data.neat_packing:
        found = "packing without neat_packing: the records of a pack attend to each other"
        return [Finding("packing", "warning", found, "Set neat_packing: true")]
    findings: list[Finding] = []
    if recipe.cutoff_len % PADDING:
        length = (recipe.cutoff_len // PADDING + 1) * PADDING
        found = f"neat_packing with cutoff_len {recipe.cutoff_len}, no multiple of {PADDING}: shapes do not match"
        findings.append(Finding("packing", "error", found, f"Set cutoff_len: {length}"))
    # LLaMA-Factory adds an image to a batch without one, and counts its tokens in the mask twice.
    for name, entry in read_entries(data.dataset, data.dataset_dir).items():
        if entry.get("formatting") != FORMATTING and not (entry.get("columns") or {}).get("images"):
            found = f"neat_packing with {name}, which has no images: a pack of it alone stops training"
            findings.append(Finding("packing", "error", found, f"Set neat_packing: false, or leave {name} out"))
    return findings or [Finding("packing", "ok", "neat_packing")]


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


CHECKED = (check_dataset_names, check_records, check_evaluation, check_mixing)
CHECKED_FOR_TRAINING = (
    *CHECKED,
    check_left_out,
    check_starting_points,
    check_packing,
    check_streaming,
    check_family,
    check_system_prompt,
)


def refuse_pitfalls(model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any) -> None:
    """Refuse a run that is bound to fail, and warn of one that reads everything first or measures something else.

    Raises:
        ConfigError: names all faults and what to set instead.
    """
    if not str(data_args.template).startswith("chatreid") and not list_own_datasets(data_args):
        return
    recipe = Recipe(Path(), {}, model_args, data_args, training_args, finetuning_args)
    checks = CHECKED_FOR_TRAINING if training_args.do_train else CHECKED
    findings = [finding for check in checks for finding in check(recipe)]
    faults = [f"{finding.found}. {finding.advice}" for finding in findings if finding.state == "error"]
    if faults:
        raise ConfigError("; ".join(faults) + ".")
    findings += find_whole_reads(recipe) if data_args.chatreid_lazy and training_args.do_train else []
    logger: Any = logging.get_logger(__name__)  # LLaMA-Factory adds warning_rank0 and its like to the class
    for finding in findings:
        if finding.state == "warning":
            logger.warning_rank0(f"chatreid: {finding.check}: {finding.found}. {finding.advice}.")
