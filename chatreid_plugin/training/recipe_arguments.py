"""Checks of a recipe's own values: stage, freezing, image limits, and settings known to fail hours later.

The failures are those of LLaMA-Factory 0.9.5 with transformers 5, each seen to happen; none is announced by it.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from ..errors import ConfigError
from ..images import DEFAULT_IMAGE_MAX_PIXELS, DEFAULT_IMAGE_MIN_PIXELS
from ..shards import read_json
from .model import FLAGS, list_trained_parts
from .pitfalls import find_whole_reads
from .recipe import Finding, Recipe, read_values
from .resume import choose_checkpoint, describe_run
from .tokenized_path import DATA_KEYS, PROCESSOR_KEYS, STAMP


# Keys that decide what the model sees of a crop, with what an inference file means that leaves them out.
POLICY_KEYS: dict[str, Any] = {
    "image_max_pixels": DEFAULT_IMAGE_MAX_PIXELS,
    "image_min_pixels": DEFAULT_IMAGE_MIN_PIXELS,
    "chatreid_stage": None,
    "chatreid_aspect": "stretch",
}
# transformers' TrainingArguments.ddp_timeout, in seconds.
DEFAULT_TIMEOUT = 1800


def check_stage(recipe: Recipe) -> list[Finding]:
    """Compare the stage with what trains: all parts in Stages 1 and 2, no encoder in Stage 3 (``model.py``)."""
    stage = recipe.data.chatreid_stage
    if stage is None:
        return [
            Finding("stage", "warning", "no chatreid_stage", "Set 1, 2 or 3: no image policy and no check otherwise")
        ]
    kind = recipe.finetuning.finetuning_type
    trained = list_trained_parts(stage, recipe.data.chatreid_projector)
    findings: list[Finding] = []
    for part, flag in FLAGS.items():
        frozen = getattr(recipe.finetuning, flag)
        found = f"but {flag} is {str(frozen).lower()}"
        if part in trained and frozen and (kind == "full" or part == "language"):
            findings.append(
                Finding("stage", "error", f"Stage {stage} trains the {part}, {found}", f"Set {flag}: false")
            )
        elif part == "projector" and part in trained and not frozen and kind in ("lora", "oft"):
            if "merger" not in (recipe.finetuning.additional_target or ()):
                advice = "Set additional_target: merger, or freeze_multi_modal_projector: true"
                findings.append(Finding("stage", "error", f"{kind} never reaches the projector, {found}", advice))
        elif part not in trained and not frozen:
            findings.append(
                Finding("stage", "error", f"Stage {stage} freezes the {part}, {found}", f"Set {flag}: true")
            )
    return findings or [Finding("stage", "ok", f"{stage}, {kind} tuning of {', '.join(sorted(trained))}")]


def check_swap(recipe: Recipe) -> list[Finding]:
    """Warn of a Stage 2 that keeps its encoder; the key in another stage does not parse at all."""
    if recipe.data.chatreid_stage != 2:
        return []
    if recipe.data.chatreid_encoder is None:
        return [
            Finding(
                "decoder swap",
                "warning",
                "Stage 2 without chatreid_encoder: model_name_or_path's own encoder trains",
                "Set chatreid_encoder to Stage 1's output (paper section 3.3)",
            )
        ]
    return [Finding("decoder swap", "ok", f"encoder of {recipe.data.chatreid_encoder}")]


def check_template(recipe: Recipe) -> list[Finding]:
    """Warn of a template without the plugin's images; with a stage set, it does not parse at all."""
    template = recipe.data.template
    if str(template).startswith("chatreid"):
        return [Finding("template", "ok", f"{template}")]
    return [Finding("template", "warning", f"{template}: stock image handling", "Set template: chatreid")]


def check_image_limits(recipe: Recipe, compare: Path | None) -> list[Finding]:
    """Compare what the model sees in training and at inference; with other sizes it answers worse, without a word.

    Args:
        recipe: the recipe.
        compare: an evaluation file, or an inference file of LLaMA-Factory; None compares with both's defaults.
    """
    own = {key: recipe.values.get(key, default) for key, default in POLICY_KEYS.items()}
    absent = [key for key in ("image_max_pixels", "image_min_pixels") if key not in recipe.values]
    findings: list[Finding] = []
    if absent:
        advice = "Write them down, so that inference can use the same"
        findings.append(Finding("image limits", "warning", f"{', '.join(absent)} not given", advice))
    other, name = dict(POLICY_KEYS), "inference files that do not set them"
    if compare is not None:
        given = read_values(compare, [])
        other, name = {key: given.get(key, default) for key, default in POLICY_KEYS.items()}, str(compare)
    keys = POLICY_KEYS if compare is not None else ("image_max_pixels", "image_min_pixels")
    for key in keys:
        if own[key] != other[key]:
            found = f"{key} is {own[key]} here, {other[key]} in {name}"
            advice = f"Set {key}: {own[key]} there as well"
            findings.append(Finding("image limits", "warning" if compare is None else "error", found, advice))
    area = f"{own['image_min_pixels']} to {own['image_max_pixels']} pixels"
    return findings or [Finding("image limits", "ok", f"{area}, the same in {name}")]


def check_lazy(recipe: Recipe) -> list[Finding]:
    """Refuse what needs all token ids first together with ``chatreid_lazy``, and warn of what reads everything."""
    if not recipe.data.chatreid_lazy:
        return [Finding("lazy mode", "ok", "off")]
    findings = [
        Finding("lazy mode", "error", f"chatreid_lazy and {key} exclude each other", "Set one to false or null")
        for key in ("streaming", "packing", "tokenized_path")
        if getattr(recipe.data, key)
    ]
    findings += find_whole_reads(recipe)
    return findings or [Finding("lazy mode", "ok", "on")]


def check_eager(recipe: Recipe) -> list[Finding]:
    """Look at what only counts when all records are tokenized before the first step."""
    data = recipe.data
    if data.chatreid_lazy or data.streaming:
        return []
    findings: list[Finding] = []
    cores = len(os.sched_getaffinity(0))
    if (data.preprocessing_num_workers or 0) > cores:
        found = f"preprocessing_num_workers: {data.preprocessing_num_workers} on {cores} core(s) may run out of memory"
        findings.append(Finding("tokenization", "warning", found, f"Set preprocessing_num_workers: {cores}"))
    if recipe.training.ddp_timeout <= DEFAULT_TIMEOUT:
        found = f"other processes wait {recipe.training.ddp_timeout} s for the first one's tokenization, then abort"
        findings.append(Finding("tokenization", "warning", found, "Set ddp_timeout: 180000000 or chatreid_lazy"))
    return findings or [Finding("tokenization", "ok", "before the first step")]


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
    findings: list[Finding] = []
    for key, value in wanted.items():
        if content.get(key, "auto") not in ("auto", value):
            found = f"{key} is {content[key]} in the file, {value} in the recipe"
            findings.append(Finding("DeepSpeed", "error", found, f'Set "{key}": "auto"'))
    if content.get("train_batch_size", "auto") != "auto":
        found = f"train_batch_size: {content['train_batch_size']} fits one number of GPUs only"
        findings.append(Finding("DeepSpeed", "warning", found, 'Set "train_batch_size": "auto"'))
    stage = (content.get("zero_optimization") or {}).get("stage", 0)
    return findings or [Finding("DeepSpeed", "ok", f"ZeRO-{stage}; launch with FORCE_TORCHRUN=1")]


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
