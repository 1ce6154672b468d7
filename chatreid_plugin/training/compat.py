"""Every name of LLaMA-Factory, transformers and PEFT that the plugin relies on but they do not promise, and the check.

Tested with 0.9.5. When a signature drifts, the hook stops with both versions named instead of misbehaving later.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

from ..errors import UpstreamError
from ..upstream import TESTED_VERSIONS, find_version, get_upstream


@dataclass(frozen=True, slots=True)
class UpstreamFunction:
    """A function that the plugin wraps: its module, its name inside the module, its parameter names."""

    module: str
    name: str
    parameters: tuple[str, ...]


WRAPPED_FUNCTIONS = (
    UpstreamFunction("llamafactory.hparams.parser", "get_train_args", ("args",)),
    UpstreamFunction("llamafactory.hparams.parser", "get_infer_args", ("args",)),
    UpstreamFunction("llamafactory.data.parser", "DatasetAttr.join", ("self", "attr")),
    UpstreamFunction("llamafactory.data.template", "get_template_and_fix_tokenizer", ("tokenizer", "data_args")),
    UpstreamFunction(
        "llamafactory.data.loader",
        "_load_single_dataset",
        ("dataset_attr", "model_args", "data_args", "training_args"),
    ),
    UpstreamFunction(
        "llamafactory.data.loader", "align_dataset", ("dataset", "dataset_attr", "data_args", "training_args")
    ),
    UpstreamFunction(
        "llamafactory.data.loader",
        "_get_preprocessed_dataset",
        ("dataset", "data_args", "training_args", "stage", "template", "tokenizer", "processor", "is_eval"),
    ),
    UpstreamFunction(
        "llamafactory.data.loader",
        "_get_dataset_processor",
        ("data_args", "stage", "template", "tokenizer", "processor", "do_generate"),
    ),
    UpstreamFunction(
        "llamafactory.data.loader",
        "get_dataset",
        ("template", "model_args", "data_args", "training_args", "stage", "tokenizer", "processor"),
    ),
    UpstreamFunction("llamafactory.train.tuner", "_training_function", ("config",)),
    UpstreamFunction("llamafactory.train.tuner", "export_model", ("args",)),
    UpstreamFunction("llamafactory.launcher", "launch", ()),
    UpstreamFunction(
        "llamafactory.model.loader",
        "init_adapter",
        ("config", "model", "model_args", "finetuning_args", "is_trainable"),
    ),
    UpstreamFunction(
        "llamafactory.data.mm_plugin",
        "Qwen2VLPlugin._get_mm_token_metadata",
        ("self", "images", "videos", "audios", "processor"),
    ),
    UpstreamFunction("llamafactory.data.mm_plugin", "Qwen2VLPlugin._preprocess_image", ("self", "image", "kwargs")),
    UpstreamFunction("llamafactory.data.mm_plugin", "MMPluginMixin._regularize_images", ("self", "images", "kwargs")),
    UpstreamFunction(
        "llamafactory.data.mm_plugin",
        "BasePlugin.get_mm_inputs",
        ("self", "images", "videos", "audios", "imglens", "vidlens", "audlens", "batch_ids", "processor"),
    ),
    UpstreamFunction(
        "llamafactory.train.sft.trainer", "CustomSeq2SeqTrainer.create_optimizer", ("self", "args", "kwargs")
    ),
    UpstreamFunction(
        "llamafactory.train.sft.trainer",
        "CustomSeq2SeqTrainer.compute_loss",
        ("self", "model", "inputs", "args", "kwargs"),
    ),
    UpstreamFunction(
        "llamafactory.train.sft.trainer",
        "CustomSeq2SeqTrainer.prediction_step",
        ("self", "model", "inputs", "prediction_loss_only", "ignore_keys", "gen_kwargs"),
    ),
    UpstreamFunction(
        "llamafactory.train.sft.trainer", "CustomSeq2SeqTrainer._get_train_sampler", ("self", "args", "kwargs")
    ),
    # Those that it has from transformers' Trainer:
    UpstreamFunction(
        "llamafactory.train.sft.trainer", "CustomSeq2SeqTrainer._get_eval_sampler", ("self", "eval_dataset")
    ),
    UpstreamFunction(
        "llamafactory.train.sft.trainer",
        "CustomSeq2SeqTrainer.evaluation_loop",
        ("self", "dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix"),
    ),
    UpstreamFunction("llamafactory.train.sft.trainer", "CustomSeq2SeqTrainer.log", ("self", "logs", "start_time")),
    UpstreamFunction(
        "llamafactory.train.sft.trainer",
        "CustomSeq2SeqTrainer._get_num_items_in_batch",
        ("self", "batch_samples", "device"),
    ),
    UpstreamFunction(
        "transformers.trainer", "Trainer._load_from_checkpoint", ("self", "resume_from_checkpoint", "model")
    ),
    UpstreamFunction("transformers.trainer", "Trainer._load_best_model", ("self",)),
    UpstreamFunction("llamafactory.data.collator", "MultiModalDataCollatorForSeq2Seq.__call__", ("self", "features")),
)

# Lists of argument classes inside llamafactory.hparams.parser, in which DataArguments is replaced in place.
ARGUMENT_LISTS = ("_TRAIN_ARGS", "_INFER_ARGS", "_EVAL_ARGS", "_TRAIN_MCA_ARGS")

# Names that are used as they are: module -> what `get_upstream` is asked for.
USED_NAMES: dict[str, tuple[str, ...]] = {
    "llamafactory.hparams.parser": ("DataArguments", *ARGUMENT_LISTS),
    "llamafactory.data.converter": ("get_dataset_converter", "register_dataset_converter"),
    "llamafactory.data.loader": ("get_dataset_list",),
    "llamafactory.data.parser": ("DatasetAttr", "get_dataset_list"),
    "llamafactory.data.mm_plugin": ("register_mm_plugin", "Qwen2VLPlugin"),
    "llamafactory.data.collator": ("MultiModalDataCollatorForSeq2Seq",),
    "llamafactory.data.template": ("TEMPLATES", "get_mm_plugin"),
    "llamafactory.train.sft.trainer": ("CustomSeq2SeqTrainer",),
    "llamafactory.train.tuner": ("read_args", "get_infer_args"),
    "peft.peft_model": ("PeftModel.load_adapter",),
    "peft.tuners.lora.model": ("dispatch_megatron",),
    "transformers.trainer": ("Trainer",),
    "llamafactory.extras.misc": ("get_device_count", "is_env_enabled"),
    "transformers.integrations.deepspeed": ("_hf_deepspeed_config_weak_ref", "unset_hf_deepspeed_config"),
    "transformers.utils.generic": ("is_flash_attention_requested",),
    "transformers.models.qwen2_vl.modeling_qwen2_vl": ("VisionAttention", "eager_attention_forward"),
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl": ("Qwen2_5_VLVisionAttention", "eager_attention_forward"),
    "transformers.models.qwen3_vl.modeling_qwen3_vl": ("Qwen3VLVisionAttention", "eager_attention_forward"),
}


@cache
def takes_token_types() -> bool:
    """Tell whether transformers places image tokens by ``mm_token_type_ids``.

    Those before its pull request 43972 find the images themselves, and ``generate`` refuses the argument there.
    LLaMA-Factory's collator asks the same question in the same way.
    """
    from transformers import Qwen2VLModel

    return "mm_token_type_ids" in inspect.signature(Qwen2VLModel.get_rope_index).parameters


def get_function(module: ModuleType, name: str) -> Callable[..., Any]:
    """Return a function of ``WRAPPED_FUNCTIONS`` after checking its parameters.

    Raises:
        UpstreamError: the function is gone or its parameters have changed.
    """
    expected = next(f for f in WRAPPED_FUNCTIONS if f.module == module.__name__ and f.name == name)
    function = get_upstream(module, name)
    found = tuple(inspect.signature(function).parameters)
    if found != expected.parameters:
        package = module.__name__.partition(".")[0]
        tested = TESTED_VERSIONS[package]
        raise UpstreamError(
            f"{module.__name__}.{name} of {package} {find_version(package)} takes ({', '.join(found)}), where "
            f"{tested}, which this plugin was tested with, takes ({', '.join(expected.parameters)}). Install "
            f"{package}=={tested} or a newer chatreid-plugin."
        )
    return function
