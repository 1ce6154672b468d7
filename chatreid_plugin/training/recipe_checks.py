"""Rules about a recipe's settings, each a function that returns its findings.

``chatreid doctor --yaml`` lists the findings of all. A run with our templates or our records is refused by those that
would crash or stall it once the data have been read, as its arguments are parsed. The failures are those of
LLaMA-Factory 0.9.5 with transformers 5 and datasets 4.0.0, each seen to happen; none is announced by it.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from llamafactory.extras import logging
from transformers.trainer_utils import get_last_checkpoint

from ..checkpoints import read_system_prompt
from ..errors import ChatReIDError, ConfigError
from ..images import DEFAULT_IMAGE_MAX_PIXELS, DEFAULT_IMAGE_MIN_PIXELS
from ..shards import FORMATTING, read_json
from ..tasks import find_default_system
from .dataset_info import list_own_datasets, read_entries
from .model import FLAGS, list_trained_parts
from .recipe import Finding, Findings, Recipe, parse_recipe, read_values
from .recipe_data import check_dataset_names, check_datasets, check_left_out
from .recipe_model import (
    TEMPLATE_FAMILIES,
    check_checkpoints,
    check_family,
    check_memory,
    check_starting_points,
    find_right_template,
)
from .resume import choose_checkpoint, describe_run
from .tokenized_path import DATA_KEYS, PROCESSOR_KEYS, STAMP
from .trainer import check_vision_rate, find_prompt, read_recorded


# Keys that decide what the model sees of a crop, with what an inference file means that leaves them out.
POLICY_KEYS: dict[str, Any] = {
    "image_max_pixels": DEFAULT_IMAGE_MAX_PIXELS,
    "image_min_pixels": DEFAULT_IMAGE_MIN_PIXELS,
    "chatreid_stage": None,
    "chatreid_aspect": "stretch",
}
# transformers' TrainingArguments.ddp_timeout, in seconds.
DEFAULT_TIMEOUT = 1800
# LLaMA-Factory pads a batch to a multiple of this many tokens (data/collator.py, pad_to_multiple_of).
PADDING = 8


def check_stage(recipe: Recipe) -> list[Finding]:
    """Compare the stage with what trains: all parts in Stages 1 and 2, no encoder in Stage 3 (``model.py``)."""
    findings, stage = Findings("stage"), recipe.data.chatreid_stage
    if stage is None:
        findings.warn("no chatreid_stage", "Set 1, 2 or 3: no image policy and no check otherwise")
        return findings
    kind = recipe.finetuning.finetuning_type
    trained = list_trained_parts(stage, recipe.data.chatreid_projector)
    for part, flag in FLAGS.items():
        frozen = getattr(recipe.finetuning, flag)
        found = f"but {flag} is {str(frozen).lower()}"
        if part in trained and frozen and (kind == "full" or part == "language"):
            findings.error(f"Stage {stage} trains the {part}, {found}", f"Set {flag}: false")
        elif part == "projector" and part in trained and not frozen and kind in ("lora", "oft"):
            if "merger" not in (recipe.finetuning.additional_target or ()):
                advice = "Set additional_target: merger, or freeze_multi_modal_projector: true"
                findings.error(f"{kind} never reaches the projector, {found}", advice)
        elif part not in trained and not frozen:
            findings.error(f"Stage {stage} freezes the {part}, {found}", f"Set {flag}: true")
    return findings.or_ok(f"{stage}, {kind} tuning of {', '.join(sorted(trained))}")


def check_swap(recipe: Recipe) -> list[Finding]:
    """Warn of a Stage 2 that keeps its encoder; the key in another stage does not parse at all."""
    if recipe.data.chatreid_stage != 2:
        return []
    findings = Findings("decoder swap")
    if recipe.data.chatreid_encoder is None:
        found = "Stage 2 without chatreid_encoder: model_name_or_path's own encoder trains"
        findings.warn(found, "Set chatreid_encoder to Stage 1's output (paper section 3.3)")
    return findings.or_ok(f"encoder of {recipe.data.chatreid_encoder}")


def check_template(recipe: Recipe) -> list[Finding]:
    """Warn of a template without the plugin's images; with a stage set, it does not parse at all."""
    findings, template = Findings("template"), str(recipe.data.template)
    if not template.startswith("chatreid"):
        findings.warn(f"{template}: stock image handling", "Set template: chatreid")
    return findings.or_ok(template)


def check_records(recipe: Recipe) -> list[Finding]:
    """Refuse ChatReID records outside instruction tuning, or with a template that cannot read them.

    Pre-training would learn a literal ``<image>``; other stages and templates stop in the middle of tokenization.
    """
    own, template = list_own_datasets(recipe.data), str(recipe.data.template)
    if not own:
        return []
    several = f" and {len(own) - 1} more" if len(own) > 1 else ""
    findings = Findings("records")
    if recipe.finetuning.stage != "sft":
        found = f"stage: {recipe.finetuning.stage} cannot train on ChatReID records ({own[0]}{several})"
        findings.error(found, "Set stage: sft")
    if template not in TEMPLATE_FAMILIES:
        found = f"template: {template} cannot read ChatReID records ({own[0]}{several})"
        advice = f"Set template: {find_right_template(recipe) or 'chatreid'}"
        findings.error(found, advice)
    return findings.or_ok(f"{len(own)} data set(s) of ChatReID records")


def check_evaluation(recipe: Recipe) -> list[Finding]:
    """Refuse metrics and predictions that ``eval_on_each_dataset`` breaks; warn of people on both sides."""
    data, training = recipe.data, recipe.training
    findings = Findings("evaluation")
    if data.eval_on_each_dataset and data.eval_dataset:
        prefixes = tuple(f"eval_{name}_" for name in data.eval_dataset)
        metric = training.metric_for_best_model
        # Set by load_best_model_at_end and its like as well.
        if metric is not None and not f"eval_{metric.removeprefix('eval_')}".startswith(prefixes):
            found = f"eval_on_each_dataset gives no {metric} for the best model, but one of each data set: KeyError"
            advice = f"Set metric_for_best_model: {prefixes[0]}loss, or eval_on_each_dataset: false"
            findings.error(found, advice)
        if training.do_predict:
            found = "eval_on_each_dataset with do_predict ends in KeyError, once all training is done"
            findings.error(found, "Set eval_on_each_dataset: false")
    if data.val_size > 0 and list_own_datasets(data):
        found = "val_size holds out records, not people: those it evaluates on are in training as well"
        advice = "Build with validation_share and name the data sets that end in _val as eval_dataset"
        findings.warn(found, advice)
    return findings.or_ok("on eval_dataset" if data.eval_dataset else "none")


def check_packing(recipe: Recipe) -> list[Finding]:
    """Refuse ``neat_packing`` where positions and mask come out of different lengths; warn of plain packing."""
    data = recipe.data
    if not data.packing or recipe.finetuning.stage != "sft":
        return [Finding("packing", "ok", "off")]
    if not data.neat_packing:
        found = "packing without neat_packing: the records of a pack attend to each other"
        return [Finding("packing", "warning", found, "Set neat_packing: true")]
    findings = Findings("packing")
    if recipe.cutoff_len % PADDING:
        length = (recipe.cutoff_len // PADDING + 1) * PADDING
        found = f"neat_packing with cutoff_len {recipe.cutoff_len}, no multiple of {PADDING}: shapes do not match"
        findings.error(found, f"Set cutoff_len: {length}")
    # LLaMA-Factory adds an image to a batch without one, and counts its tokens in the mask twice.
    for name, entry in read_entries(data.dataset, data.dataset_dir).items():
        if entry.get("formatting") != FORMATTING and not (entry.get("columns") or {}).get("images"):
            found = f"neat_packing with {name}, which has no images: a pack of it alone stops training"
            findings.error(found, f"Set neat_packing: false, or leave {name} out")
    return findings.or_ok("neat_packing")


def check_mixing(recipe: Recipe) -> list[Finding]:
    """Refuse ``interleave_once``, which the ``datasets`` that LLaMA-Factory 0.9.5 pins (4.0.0) does not know."""
    findings = Findings("mixing")
    if recipe.data.mix_strategy == "interleave_once":
        findings.error("mix_strategy: interleave_once raises ValueError", "Use concat or interleave_under")
    return findings.or_ok(recipe.data.mix_strategy)


def check_streaming(recipe: Recipe) -> list[Finding]:
    """Refuse streaming settings that crash: batches cut across images, and no worker to make a shard."""
    if not recipe.data.streaming:
        return [Finding("streaming", "ok", "off")]
    findings = Findings("streaming")
    if recipe.training.accelerator_config.dispatch_batches is not False:
        found = "streaming with dispatch_batches: the first process cuts pixel values at the wrong places"
        findings.error(found, "Set accelerator_config: {dispatch_batches: false}")
    if recipe.training.dataloader_num_workers == 0:
        found = "streaming with dataloader_num_workers: 0 ends with StopIteration"
        findings.error(found, "Set dataloader_num_workers: 1 or more")
    advice = "Prefer chatreid_lazy: true: no cache either, and a known length"
    return findings or [Finding("streaming", "warning", "on: resuming reads everything again", advice)]


def check_lazy(recipe: Recipe) -> list[Finding]:
    """Refuse what needs all token ids first together with ``chatreid_lazy``, and warn of what reads everything."""
    if not recipe.data.chatreid_lazy:
        return [Finding("lazy mode", "ok", "off")]
    findings = Findings("lazy mode")
    for key in ("streaming", "packing", "tokenized_path"):
        if getattr(recipe.data, key):
            findings.error(f"chatreid_lazy: true and {key} exclude each other", "Set one of them to false or null")
    if recipe.finetuning.include_effective_tokens_per_second and recipe.training.do_train:
        found = "include_effective_tokens_per_second reads and decodes every record before the first step"
        findings.warn(found, "Leave it out with chatreid_lazy")
    return findings.or_ok("on")


def check_encoder_rate(recipe: Recipe) -> list[Finding]:
    """Look at ``chatreid_vision_learning_rate`` as the run does; the parse has left its DeepSpeed file out."""
    rate = recipe.data.chatreid_vision_learning_rate
    try:
        check_vision_rate(rate, recipe.training, recipe.finetuning)
    except ConfigError as error:
        advice = "Or drop chatreid_vision_learning_rate: all parts then have one rate"
        return [Finding("encoder rate", "error", str(error).rstrip("."), advice)]
    return [] if rate is None else [Finding("encoder rate", "ok", f"{rate} for the vision encoder")]


def check_eager(recipe: Recipe) -> list[Finding]:
    """Look at what only counts when all records are tokenized before the first step."""
    data = recipe.data
    if data.chatreid_lazy or data.streaming:
        return []
    findings = Findings("tokenization")
    cores = len(os.sched_getaffinity(0))
    if (data.preprocessing_num_workers or 0) > cores:
        found = f"preprocessing_num_workers: {data.preprocessing_num_workers} on {cores} core(s) may run out of memory"
        findings.warn(found, f"Set preprocessing_num_workers: {cores}")
    if recipe.training.ddp_timeout <= DEFAULT_TIMEOUT:
        found = f"other processes wait {recipe.training.ddp_timeout} s for the first one's tokenization, then abort"
        findings.warn(found, "Set ddp_timeout: 180000000 or chatreid_lazy")
    return findings.or_ok("before the first step")


def check_tokenized_path(recipe: Recipe) -> list[Finding]:
    """Compare saved tokens with the recipe; records, tokenizer and wordings are only compared as training starts."""
    name = recipe.data.tokenized_path
    if name is None:
        return []
    folder = Path(name)
    if not folder.is_dir() or not any(folder.iterdir()):
        return [Finding("tokenized_path", "ok", f"{name} will be written")]
    advice = "Remove it to tokenize again, or name a new folder"
    if not str(recipe.data.template).startswith("chatreid"):
        found = f"{name} exists: LLaMA-Factory takes what is in it, whatever the other settings are"
        return [Finding("tokenized_path", "warning", found, advice)]
    if not (folder / STAMP).is_file():
        found = f"{name} holds no tokens that this plugin has written whole"
        return [Finding("tokenized_path", "error", found, advice)]
    stamp = read_json(folder / STAMP)
    own = {key: getattr(recipe.data, key) for key in DATA_KEYS}
    own |= {key: getattr(recipe.model, key) for key in PROCESSOR_KEYS}
    different = [key for key, value in own.items() if stamp.get(key) != value]
    if different:
        return [Finding("tokenized_path", "error", f"{name} was made with other {', '.join(different)}", advice)]
    return [Finding("tokenized_path", "ok", f"{name} was made with these settings")]


def check_deepspeed(recipe: Recipe) -> list[Finding]:
    """Compare the DeepSpeed file's batch sizes with the recipe's; transformers stops at a difference."""
    content = recipe.read_deepspeed()
    if content is None:
        return [Finding("DeepSpeed", "ok", "not used")]
    wanted = {
        "train_micro_batch_size_per_gpu": recipe.training.per_device_train_batch_size,
        "gradient_accumulation_steps": recipe.training.gradient_accumulation_steps,
    }
    findings = Findings("DeepSpeed")
    for key, value in wanted.items():
        if content.get(key, "auto") not in ("auto", value):
            found = f"{key} is {content[key]} in the file, {value} in the recipe"
            findings.error(found, f'Set "{key}": "auto"')
    if content.get("train_batch_size", "auto") != "auto":
        found = f"train_batch_size: {content['train_batch_size']} fits one number of GPUs only"
        findings.warn(found, 'Set "train_batch_size": "auto"')
    stage = (content.get("zero_optimization") or {}).get("stage", 0)
    return findings.or_ok(f"ZeRO-{stage}; launch with FORCE_TORCHRUN=1")


def check_output(recipe: Recipe) -> list[Finding]:
    """Look for an earlier run in ``output_dir``, and at the checkpoint to resume from, chosen as a run chooses it."""
    folder = Path(recipe.training.output_dir)
    named = recipe.values.get("resume_from_checkpoint")
    overwrites = bool(recipe.values.get("overwrite_output_dir"))
    # LLaMA-Factory 0.9.5 (hparams/parser.py) goes on with the last one by itself.
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    resume = named or (None if overwrites else last)
    run = describe_run(recipe.data, recipe.training, recipe.finetuning, bool(named))
    run = replace(run, deepspeed=bool(recipe.values.get("deepspeed")))  # the parse left it out
    try:
        chosen = choose_checkpoint(resume, run)
    except ConfigError as error:
        return [Finding("output", "error", str(error))]
    if named:
        return [Finding("output", "ok", f"{folder}, resumed from {chosen}")]
    if chosen:
        found = f"{folder}: training goes on from {Path(str(chosen)).name}"
        advice = "Set overwrite_output_dir: true or another output_dir to start anew"
        return [Finding("output", "warning", found, advice)]
    return [_check_earlier_run(folder, last, overwrites)]


def _check_earlier_run(folder: Path, last: str | None, overwrites: bool) -> Finding:
    """Look at an output folder in which nothing is resumed; ``last`` is its last checkpoint."""
    if not (last or any(folder.glob("*.safetensors*"))):
        return Finding("output", "ok", f"{folder}")
    if overwrites:
        found = f"{folder} holds an earlier run, which will be overwritten"
        advice = f"To go on with it, set resume_from_checkpoint: {last or 'CHECKPOINT'}"
        return Finding("output", "warning", found, advice)
    if last:
        found = f"{folder} holds half-written checkpoints alone: training starts anew"
        return Finding("output", "warning", found, "Remove them, or set overwrite_output_dir: true")
    advice = "Set another output_dir, or overwrite_output_dir: true"
    return Finding("output", "error", f"{folder} holds a finished model", advice)


def _read_model_keys(path: Path) -> dict[str, Any]:
    """Return what a file says of the model: an evaluation's section ``model``, or LLaMA-Factory's keys."""
    values = read_values(path, [])
    return values.get("model", values) if "data" in values else values


def check_image_limits(recipe: Recipe, compare: Path | None) -> list[Finding]:
    """Compare what the model sees in training and at inference; with other sizes it answers worse, without a word.

    Args:
        recipe: the recipe.
        compare: an evaluation file, or an inference file of LLaMA-Factory; None compares with both's defaults.
    """
    own = {key: recipe.values.get(key, default) for key, default in POLICY_KEYS.items()}
    absent = [key for key in ("image_max_pixels", "image_min_pixels") if key not in recipe.values]
    findings = Findings("image limits")
    if absent:
        advice = "Write them down, so that inference can use the same"
        findings.warn(f"{', '.join(absent)} not given", advice)
    other, name = dict(POLICY_KEYS), "inference files that do not set them"
    if compare is not None:
        given = _read_model_keys(compare)
        other, name = {key: given.get(key, default) for key, default in POLICY_KEYS.items()}, str(compare)
    keys = POLICY_KEYS if compare is not None else ("image_max_pixels", "image_min_pixels")
    for key in keys:
        if own[key] != other[key]:
            found = f"{key} is {own[key]} here, {other[key]} in {name}"
            advice = f"Set {key}: {own[key]} there as well"
            (findings.warn if compare is None else findings.error)(found, advice)
    area = f"{own['image_min_pixels']} to {own['image_max_pixels']} pixels"
    return findings.or_ok(f"{area}, the same in {name}")


def check_system_prompt(recipe: Recipe, compare: Path | None = None) -> list[Finding]:
    """Compare the recipe's system prompt with the model's own training and with an inference file.

    Args:
        recipe: the recipe.
        compare: an evaluation file, or an inference file of LLaMA-Factory.
    """
    own = find_prompt(recipe.data)
    if own is None:
        return []
    findings = Findings("system prompt")
    before = read_recorded(recipe.model.model_name_or_path, recipe.model.adapter_name_or_path)
    if before not in (None, own):
        found = f"{own!r} here, but {recipe.model.model_name_or_path} was trained with {before!r}"
        findings.warn(found, "Set default_system to the same, unless meant")
    if compare is not None and compare.is_file():  # check_image_limits reports one that is not there
        values = _read_model_keys(compare)
        other = _find_other(values, recipe)
        if other != own:
            key = "default_system" if "template" in values else "system_prompt"
            found = f"{own!r} here, {other!r} in {compare}"
            advice = f"Set {key} there to the recipe's default_system"
            findings.error(found, advice)
    return findings.or_ok(f"{own!r}")


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


CHECKED = (check_dataset_names, check_records, check_evaluation, check_mixing, check_lazy)
CHECKED_FOR_TRAINING = (
    *CHECKED,
    check_left_out,
    check_starting_points,
    check_packing,
    check_streaming,
    check_family,
    check_system_prompt,
)
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
    check_encoder_rate,
    check_eager,
    check_tokenized_path,
    check_deepspeed,
    check_output,
    check_checkpoints,
    check_memory,
    check_datasets,
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
    logger: Any = logging.get_logger(__name__)  # LLaMA-Factory adds warning_rank0 and its like to the class
    for finding in findings:
        if finding.state == "warning":
            logger.warning_rank0(f"chatreid: {finding.check}: {finding.found}. {finding.advice}.")


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
