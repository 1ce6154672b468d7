"""A tiny Qwen2-VL, Qwen2.5-VL or Qwen3-VL with real tokenizer and processor files, loadable by stock LLaMA-Factory.

Architecture, special tokens and file layout are the family's; only the sizes are small. Weights are random, except
that ``warm_up.py`` teaches the language part the words of the tasks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from ..shards import open_folder_atomically
from ..tasks import LETTERS, NO, SYSTEM_PROMPT, YES
from .people import Person
from .texts import list_vocabulary_texts
from .warm_up import warm_up


# Qwen2-VL's added tokens, in its order (tokenizer_config.json of Qwen2-VL-2B-Instruct).
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

Family = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]

# Qwen3-VL's template has no system prompt of its own.
DEFAULT_SYSTEM = (
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\n" + SYSTEM_PROMPT + "<|im_end|>\n{% endif %}"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}" + DEFAULT_SYSTEM + "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class TinySizes:
    """Sizes of the tiny model; a visual token covers ``2 * patch_size`` pixels squared."""

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    vision_hidden: int = 128
    vision_layers: int = 2
    patch_size: int = 16
    vocabulary: int = 1000


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with Qwen2's special tokens; Yes, No and the letters are single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(  # type: ignore[call-arg]
        vocab_size=vocabulary - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Repeated, so that they are frequent enough for a token of their own.
    single = [f"{word}, {word} {word}." for word in (YES, NO, *LETTERS)] * 200
    tokenizer.train_from_iterator([*texts, *single], trainer)
    make_tokenizer: Any = Qwen2Tokenizer  # its signature hides what it accepts
    return make_tokenizer(
        tokenizer_object=tokenizer,
        unk_token=None,
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS),
        chat_template=CHAT_TEMPLATE,
        model_max_length=32768,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast, sizes: TinySizes, family: Family = "qwen2_vl") -> Any:
    """Return the family's processor with the tiny model's patch size."""
    classes: dict[Family, tuple[Any, Any]] = {
        "qwen2_vl": (Qwen2VLProcessor, Qwen2VLVideoProcessor),
        "qwen2_5_vl": (Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
        "qwen3_vl": (Qwen3VLProcessor, Qwen3VLVideoProcessor),
    }
    make, make_video_processor = classes[family]
    return make(
        image_processor=Qwen2VLImageProcessor(patch_size=sizes.patch_size),
        tokenizer=tokenizer,
        video_processor=make_video_processor(patch_size=sizes.patch_size),
        chat_template=CHAT_TEMPLATE.replace(DEFAULT_SYSTEM, "") if family == "qwen3_vl" else CHAT_TEMPLATE,
    )


def _configure_text(sizes: TinySizes, vocabulary: int, ids: dict[str, Any]) -> dict[str, Any]:
    half = sizes.hidden // sizes.heads // 2  # of a head; the three axes of the position share it
    return {
        "vocab_size": vocabulary,
        "hidden_size": sizes.hidden,
        "intermediate_size": 3 * sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": max(1, sizes.heads // 2),
        "head_dim": sizes.hidden // sizes.heads,
        "max_position_embeddings": 32768,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1000000.0,
            "mrope_section": [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8],
        },
        "tie_word_embeddings": True,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
    }


def _configure_vision(sizes: TinySizes, family: Family) -> dict[str, Any]:
    common = {"depth": sizes.vision_layers, "num_heads": 4, "patch_size": sizes.patch_size}
    if family == "qwen2_vl":
        return common | {"embed_dim": sizes.vision_hidden, "hidden_size": sizes.hidden, "mlp_ratio": 2}
    common |= {
        "hidden_size": sizes.vision_hidden,
        "intermediate_size": 2 * sizes.vision_hidden,
        "out_hidden_size": sizes.hidden,
    }
    if family == "qwen2_5_vl":
        # Windows of four merged patches, as the real one's 112 pixels; full attention in the last layer alone.
        return common | {"window_size": 8 * sizes.patch_size, "fullatt_block_indexes": [sizes.vision_layers - 1]}
    return common | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}


def make_model(tokenizer: PreTrainedTokenizerFast, sizes: TinySizes, seed: int, family: Family = "qwen2_vl") -> Any:
    """Return a model of the family and of the given sizes with random weights."""
    torch.manual_seed(seed)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    classes: dict[Family, tuple[Any, Any]] = {
        "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
        "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
        "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
    }
    make_config, make = classes[family]
    config = make_config(
        text_config=_configure_text(sizes, len(tokenizer), ids),
        vision_config=_configure_vision(sizes, family),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    model = make(config)
    _scale_weights(model)
    model.generation_config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    return model


def _scale_weights(model: torch.nn.Module) -> None:
    """Give every matrix the standard deviation 1/sqrt(inputs).

    transformers' 0.02 suits widths of thousands. At a width of 96 it left matching at chance: nothing that compares
    two images reaches the answer, so there is no gradient to begin with.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                inputs = parameter[0].numel()
                parameter.mul_(inputs**-0.5 / parameter.std())


def write_tiny_model(
    folder: Path,
    people: Sequence[Person],
    *,
    sizes: TinySizes | None = None,
    warm_up_steps: int = 0,
    seed: int = 0,
    family: Family = "qwen2_vl",
) -> list[float]:
    """Write a tiny model (weights, configuration, tokenizer, processor) and return the warm-up's losses.

    Args:
        folder: where to write.
        people: whose words the tokenizer and the warm-up use; not the tested ones.
        sizes: the model's sizes.
        warm_up_steps: steps of language training; 0 leaves the weights random.
        seed: of weights and texts.
        family: of the model.

    Raises:
        DataError: the disk is full or cannot be written; the folder is as it was.
    """
    sizes = sizes or TinySizes()
    tokenizer = train_tokenizer(list_vocabulary_texts(people[:100], seed), sizes.vocabulary)
    model = make_model(tokenizer, sizes, seed, family)
    losses = warm_up(model, tokenizer, people, warm_up_steps, seed=seed) if warm_up_steps else []
    with open_folder_atomically(folder, keep_others=True, failures=(SafetensorError,)) as temporary:
        model.save_pretrained(temporary)
        make_processor(tokenizer, sizes, family).save_pretrained(temporary)
    return losses
