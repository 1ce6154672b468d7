"""Checks of the checkpoints that a recipe starts from, and of the GPU memory that training them takes."""

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import read_shapes
from ..errors import ChatReIDError, ConfigError
from ..shards import read_json
from .checkpoint import COMPOSED_FOLDER, MARKER, check_completeness, is_hub_name, match_vision_tensors
from .model import find_part, list_frozen_parts
from .recipe import Finding, Recipe


# Template -> model families whose chat format it has; Qwen2-VL's and Qwen2.5-VL's are the same.
TEMPLATE_FAMILIES = {
    "chatreid": ("qwen2_vl", "qwen2_5_vl"),
    "chatreid_qwen2_5_vl": ("qwen2_5_vl", "qwen2_vl"),
    "chatreid_qwen3_vl": ("qwen3_vl",),
}
GIBIBYTE = 1 << 30
# A part of the GPU that weights and optimizer may take before the activations are likely not to fit.
COMFORTABLE_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """How many parameters a recipe trains and how many it leaves frozen."""

    trained: int
    frozen: int


@dataclass(frozen=True, slots=True)
class BytesPerParameter:
    """Bytes that one parameter takes: weight, gradient and optimizer state while it trains, weight while frozen."""

    weight: int
    gradient: int
    state: int
    frozen: int


def find_model_folder(name: str, model_args: Any) -> Path | None:
    """Return the folder of a checkpoint, None if it would have to be downloaded.

    Raises:
        ConfigError: neither a folder nor a hub name.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if not is_hub_name(name):
        raise ConfigError(f"{name} is not a folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name, revision=model_args.model_revision, cache_dir=model_args.cache_dir, local_files_only=True
            )
        )
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def check_starting_points(recipe: Recipe) -> list[Finding]:
    """Look for the folders or hub names that training starts from; a resumed Stage 2 has its own copy of them.

    LLaMA-Factory says "Failed to load tokenizer" below a traceback, after a minute of imports.
    """
    output = Path(recipe.training.output_dir)
    if recipe.training.resume_from_checkpoint and (output / COMPOSED_FOLDER / MARKER).is_file():
        return []
    return [
        Finding(key, "error", f"{key}: {name} {reason}", advise_start(key, recipe))
        for key, name in list_checkpoints(recipe).items()
        if (reason := find_absence(name, recipe.model)) is not None
    ]


def find_absence(name: str, model_args: Any) -> str | None:
    """Return why a checkpoint cannot be had, None if it can be."""
    if Path(name).is_dir():
        return None
    if not is_hub_name(name):
        return "is not a folder"
    if any(os.environ.get(variable) for variable in ("USE_MODELSCOPE_HUB", "USE_OPENMIND_HUB")):
        return None  # LLaMA-Factory's to fetch
    if find_model_folder(name, model_args) is not None:
        return None
    return _try_hub(name, model_args)


def _try_hub(name: str, model_args: Any) -> str | None:
    """Ask the hub for the smallest file of a model; the rest is fetched by whoever reads it."""
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(
            name,
            "config.json",
            revision=model_args.model_revision,
            cache_dir=model_args.cache_dir,
            token=model_args.hf_hub_token,
        )
    except (OSError, ValueError) as error:  # the hub's own errors are kinds of these
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return f"is neither a folder nor to be had from the Hugging Face hub ({first.rstrip('.')})"
    return None


def check_checkpoints(recipe: Recipe) -> list[Finding]:
    """Look for configuration and weights of the model and of the encoder that is swapped in."""
    findings: list[Finding] = []
    for key, name in list_checkpoints(recipe).items():
        try:
            findings.append(_check_checkpoint(key, name, recipe))
        except ChatReIDError as error:
            advice = "Name a checkpoint folder with safetensors weights"
            advice = advice if Path(name).is_dir() else advise_start(key, recipe)
            findings.append(Finding(key, "error", str(error), advice))
    findings += check_family(recipe)
    if len(list_checkpoints(recipe)) == 2 and all(finding.state == "ok" for finding in findings):
        findings.append(_check_encoder(recipe))
    return findings


def advise_start(key: str, recipe: Recipe) -> str:
    """Return what to do where a checkpoint is not there."""
    if key == "chatreid_encoder":
        return (
            "Train Stage 1 first (examples/stage1.yaml), or set chatreid_encoder=null to keep the model's own encoder"
        )
    if recipe.data.chatreid_stage == 3:
        return "Train Stage 2 first (examples/stage2.yaml), or name another checkpoint"
    return "Name a checkpoint folder with safetensors weights, or a model of the Hugging Face hub"


def find_family(recipe: Recipe) -> str | None:
    """Return the model's family, None where its configuration is not here; ``check_checkpoints`` reports that."""
    try:
        folder = find_model_folder(recipe.model.model_name_or_path, recipe.model)
        return None if folder is None else read_json(folder / "config.json").get("model_type")
    except ChatReIDError:
        return None


def find_right_template(recipe: Recipe) -> str | None:
    """Return our template of the model's family, None if there is none or the family is not known."""
    kind = find_family(recipe)
    return next((name for name, families in TEMPLATE_FAMILIES.items() if kind in families), None)


def check_family(recipe: Recipe) -> list[Finding]:
    """Compare the model's family with the one that the template is of."""
    kind, right = find_family(recipe), find_right_template(recipe)
    template = str(recipe.data.template)
    if kind is None or template not in TEMPLATE_FAMILIES or kind in TEMPLATE_FAMILIES[template]:
        return []
    advice = f"Set template: {right}" if right else f"These templates are for {', '.join(TEMPLATE_FAMILIES)}"
    return [Finding("template", "error", f"template {template} is not of the model's family {kind}", advice)]


def list_checkpoints(recipe: Recipe) -> dict[str, str]:
    """Return key -> folder or hub name of the checkpoints that a recipe starts from."""
    names = {"model_name_or_path": recipe.model.model_name_or_path}
    if recipe.data.chatreid_encoder is not None:
        names["chatreid_encoder"] = recipe.data.chatreid_encoder
    return names


def _check_checkpoint(key: str, name: str, recipe: Recipe) -> Finding:
    folder = find_model_folder(name, recipe.model)
    if folder is None:
        found = f"{name} is no folder here and is not in the hub's cache: it will be downloaded"
        return Finding(key, "warning", found, "Check the name; without a network, give a folder")
    kind = read_json(folder / "config.json").get("model_type")
    if kind is None:
        return Finding(key, "error", f"{folder / 'config.json'} names no model_type", "Is it a model's folder?")
    shapes = read_shapes(folder)
    check_completeness(folder)
    return Finding(key, "ok", f"{folder}, {kind}, {len(shapes)} tensors")


def _check_encoder(recipe: Recipe) -> Finding:
    """Compare the vision tensors that the swap exchanges; the swap itself refuses the same, after the launch."""
    model, encoder = (find_model_folder(name, recipe.model) for name in list_checkpoints(recipe).values())
    assert model is not None and encoder is not None  # both are "ok"
    try:
        replaced = match_vision_tensors(encoder, model, recipe.data.chatreid_projector)
    except ConfigError as error:
        return Finding("chatreid_encoder", "error", str(error), "Take Stage 1's output of the same model size")
    return Finding("chatreid_encoder", "ok", f"{len(replaced)} vision tensors fit the model")


def count_parameters(recipe: Recipe, shapes: dict[str, tuple[int, ...]]) -> ParameterCounts | None:
    """Return what trains: by the freeze flags with full tuning, the adapters with LoRA; None for other tuning.

    LoRA adds rank * (inputs + outputs) to each adapted matrix (Hu et al. 2022, arXiv:2106.09685, section 4.1).
    """
    total = sum(map(prod, shapes.values()))
    frozen_parts = list_frozen_parts(recipe.finetuning)
    kind = recipe.finetuning.finetuning_type
    if kind == "full":
        trained = sum(prod(shape) for name, shape in shapes.items() if find_part(name) not in frozen_parts)
        return ParameterCounts(trained, total - trained)
    if kind == "lora" and not recipe.model.quantization_bit:
        targets = set(recipe.finetuning.lora_target)
        adapted = [
            sum(shape)
            for name, shape in shapes.items()
            # LLaMA-Factory 0.9.5 (model_utils/misc.py): `all` spares the head, the projector and frozen parts.
            if len(shape) == 2
            and name.split(".")[-2] not in ("lm_head", "embed_tokens")
            and find_part(name) not in frozen_parts | {"projector"}
            and ("all" in targets or name.split(".")[-2] in targets)
        ]
        # PEFT trains a copy of these modules, beside the frozen original.
        whole = set(recipe.finetuning.additional_target or ())
        copied = sum(prod(shape) for name, shape in shapes.items() if whole & set(name.split(".")))
        return ParameterCounts(recipe.finetuning.lora_rank * sum(adapted) + copied, total)
    return None


def find_sizes(recipe: Recipe, zero_stage: int) -> BytesPerParameter:
    """Return the bytes that a parameter takes with AdamW.

    Mixed precision with DeepSpeed: 2 + 2 + 12 (Rajbhandari et al. 2020, arXiv:1910.02054, section 3.1). Without it
    LLaMA-Factory 0.9.5 (model/adapter.py) keeps what trains in float32: 4 + 4 + 8.
    """
    if recipe.values.get("pure_bf16"):
        return BytesPerParameter(2, 2, 4, 2)
    mixed = bool(recipe.values.get("bf16") or recipe.values.get("fp16"))
    if mixed and zero_stage:
        return BytesPerParameter(2, 2, 12, 2)
    return BytesPerParameter(4, 4, 8, 2 if mixed else 4)


def estimate_memory(recipe: Recipe, counts: ParameterCounts, processes: int) -> float:
    """Return bytes per GPU of weights, gradients and optimizer states; activations and buffers not included.

    ZeRO-1 divides the states by the number of processes, ZeRO-2 the gradients too, ZeRO-3 the weights too (the same
    paper, figure 1).
    """
    zero = (recipe.read_deepspeed() or {}).get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    sizes = find_sizes(recipe, stage)
    weights = counts.trained * sizes.weight + counts.frozen * sizes.frozen
    gradients, states = counts.trained * sizes.gradient, counts.trained * sizes.state
    if _is_offloaded(zero, "offload_optimizer"):
        states = 0
    if _is_offloaded(zero, "offload_param"):
        weights = 0
    return (
        weights / (processes if stage >= 3 else 1)
        + gradients / (processes if stage >= 2 else 1)
        + states / (processes if stage >= 1 else 1)
    )


def _is_offloaded(zero: dict[str, Any], key: str) -> bool:
    return (zero.get(key) or {}).get("device", "none") != "none"


def list_process_counts(gpus: int) -> list[int]:
    """Return the numbers of processes to estimate for: as LLaMA-Factory's launcher counts, else one and eight."""
    per_node = os.environ.get("NPROC_PER_NODE") or (str(gpus) if gpus else "")
    if not per_node.isdigit():
        return [1, 8]
    nodes = os.environ.get("NNODES", "1")
    return [int(per_node) * (int(nodes) if nodes.isdigit() else 1)]


def check_memory(recipe: Recipe) -> list[Finding]:
    """Estimate the memory per GPU and compare it with the smallest GPU of this machine."""
    try:
        folder = find_model_folder(recipe.model.model_name_or_path, recipe.model)
        shapes = None if folder is None else read_shapes(folder)
        recipe.read_deepspeed()
    except ChatReIDError:
        return []  # reported by check_checkpoints and check_deepspeed
    counts = None if shapes is None else count_parameters(recipe, shapes)
    if counts is None:
        reason = "the model is not here" if shapes is None else f"for {recipe.finetuning.finetuning_type} tuning"
        return [Finding("memory", "warning", f"not estimated: {reason}", "Watch the first steps")]
    gpus = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    needs = {number: estimate_memory(recipe, counts, number) for number in list_process_counts(len(gpus))}
    found = (
        f"{counts.trained:,} parameters train, {counts.frozen:,} are frozen: weights, gradients and AdamW take "
        + ", ".join(f"{need / GIBIBYTE:.1f} GiB on each of {number} process(es)" for number, need in needs.items())
        + ", activations not included"
    )
    return [judge_memory(found, next(iter(needs.values())), min(gpus, default=None))]


def judge_memory(found: str, need: float, available: int | None) -> Finding:
    """Return the finding for a need and a GPU's memory, both in bytes; None if there is no GPU."""
    if available is None:
        return Finding("memory", "ok", f"{found}; no GPU here to compare with")
    found = f"{found}; the GPU has {available / GIBIBYTE:.1f} GiB"
    advice = "Use more GPUs, ZeRO-3, offload_optimizer or LoRA"
    if need > available:
        return Finding("memory", "error", found, advice)
    return Finding("memory", "ok" if need <= COMFORTABLE_SHARE * available else "warning", found, advice)
