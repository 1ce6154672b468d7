"""The chat templates ``chatreid``: the base model's own, with an image plugin that knows the stage's image policy.

The plugin counts image tokens from sizes instead of pixels, and hands on which tokens are images.
"""

import copy
import dataclasses
from dataclasses import dataclass, field
from functools import wraps
from types import ModuleType
from typing import Any

import torch
from llamafactory.data.mm_plugin import Qwen2VLPlugin, Qwen3VLPlugin
from PIL import Image

from ..images import (
    DEFAULT_IMAGE_MAX_PIXELS,
    DEFAULT_IMAGE_MIN_PIXELS,
    ImagePolicy,
    count_grid,
    read_geometry,
)
from ..pixels import prepare_crop
from ..upstream import get_upstream
from .compat import get_function, takes_token_types
from .images import decode_image, read_size


# Qwen2.5-VL counts image tokens as Qwen2-VL does.
QWEN2_PLUGIN, QWEN3_PLUGIN = "chatreid_qwen2_vl", "chatreid_qwen3_vl"
# Our template's name -> the LLaMA-Factory template whose chat format it keeps, and the image plugin. Qwen3-VL is asked
# without thinking: the recipe's answers are a word or a few letters.
TEMPLATES = {
    "chatreid": ("qwen2_vl", QWEN2_PLUGIN),
    "chatreid_qwen2_5_vl": ("qwen2_vl", QWEN2_PLUGIN),
    "chatreid_qwen3_vl": ("qwen3_vl_nothink", QWEN3_PLUGIN),
}


@dataclass
class ChatReIDPlugin(Qwen2VLPlugin):
    """Qwen2-VL's plugin; ``policy`` is set from the YAML when the template is fetched."""

    policy: ImagePolicy = field(default_factory=ImagePolicy)

    def _preprocess_image(self, image: Image.Image, **kwargs: Any) -> Image.Image:
        limits = kwargs["image_max_pixels"], kwargs["image_min_pixels"]
        return prepare_crop(image, ImagePolicy(self.policy.stage, self.policy.aspect, *limits))

    def _regularize_images(self, images: list[Any], **kwargs: Any) -> Any:
        return {"images": [self._preprocess_image(decode_image(image), **kwargs) for image in images]}

    def get_mm_inputs(
        self,
        images: list[Any],
        videos: list[Any],
        audios: list[Any],
        imglens: list[int],
        vidlens: list[int],
        audlens: list[int],
        batch_ids: list[list[int]],
        processor: Any,
    ) -> dict[str, Any]:
        """Return the pixels, grids and, as a list for each record, which tokens are images.

        transformers places image tokens by ``mm_token_type_ids`` (its pull request 43972). LLaMA-Factory 0.9.5 makes
        them inside its training collator only: its HF engine (``chat``, ``api``, ``webchat``) and
        ``predict_with_generate`` pass none, and ``generate`` then numbers image tokens like words, without a warning.
        So they come from here, and ``extend_collator`` of ``loader.py`` drops them where it needs none.
        """
        inputs: dict[str, Any] = super().get_mm_inputs(
            images, videos, audios, imglens, vidlens, audlens, batch_ids, processor
        )
        if (images or videos) and takes_token_types():
            types = {processor.image_token_id: 1, processor.video_token_id: 2}  # as get_rope_index reads them
            inputs["mm_token_type_ids"] = [[types.get(token, 0) for token in ids] for ids in batch_ids]
        return inputs

    def _get_mm_token_metadata(
        self, images: list[Any], videos: list[Any], audios: list[Any], processor: Any
    ) -> dict[str, Any] | None:
        if videos or audios:
            return super()._get_mm_token_metadata(images, videos, audios, processor)
        if not images:
            return {}
        policy = ImagePolicy(
            self.policy.stage,
            self.policy.aspect,
            getattr(processor, "image_max_pixels", DEFAULT_IMAGE_MAX_PIXELS),
            getattr(processor, "image_min_pixels", DEFAULT_IMAGE_MIN_PIXELS),
        )
        geometry = read_geometry(processor.image_processor)
        grids = [count_grid(*read_size(image), policy, geometry) for image in images]
        return {"image_grid_thw": torch.tensor(grids, dtype=torch.long)}


@dataclass
class ChatReIDQwen3Plugin(ChatReIDPlugin, Qwen3VLPlugin):
    """The same for Qwen3-VL, whose videos LLaMA-Factory writes with timestamps."""


def register_plugin(module: ModuleType) -> None:
    """Register the plugin inside ``llamafactory.data.mm_plugin``, after checking what it overrides."""
    get_function(module, "Qwen2VLPlugin._get_mm_token_metadata")
    get_function(module, "Qwen2VLPlugin._preprocess_image")
    get_function(module, "MMPluginMixin._regularize_images")
    get_function(module, "BasePlugin.get_mm_inputs")
    get_upstream(module, "register_mm_plugin")(QWEN2_PLUGIN, ChatReIDPlugin)
    get_upstream(module, "register_mm_plugin")(QWEN3_PLUGIN, ChatReIDQwen3Plugin)


def register_templates(module: ModuleType) -> None:
    """Register the templates inside ``llamafactory.data.template``; the YAML sets the policy when one is fetched."""
    registered = get_upstream(module, "TEMPLATES")
    get_mm_plugin = get_upstream(module, "get_mm_plugin")
    get_template = get_function(module, "get_template_and_fix_tokenizer")
    defaults = {name: registered[base].default_system for name, (base, _) in TEMPLATES.items()}
    for name, (base, plugin_name) in TEMPLATES.items():
        stock = registered[base]
        plugin = get_mm_plugin(
            plugin_name, image_token=stock.mm_plugin.image_token, video_token=stock.mm_plugin.video_token
        )
        registered[name] = dataclasses.replace(stock, mm_plugin=plugin)

    @wraps(get_template)
    def get_chatreid_template(tokenizer: Any, data_args: Any) -> Any:
        template = get_template(tokenizer, data_args)
        if data_args.template in defaults:
            # LLaMA-Factory writes default_system into the registered template, for every later fetch.
            template = copy.copy(template)
            registered[data_args.template].default_system = defaults[data_args.template]
        if isinstance(template.mm_plugin, ChatReIDPlugin):
            # getattr: LLaMA-Factory's own DataArguments, made in Python, know no stage.
            template.mm_plugin.policy = ImagePolicy(
                getattr(data_args, "chatreid_stage", None), getattr(data_args, "chatreid_aspect", "stretch")
            )
        return template

    module.get_template_and_fix_tokenizer = get_chatreid_template  # type: ignore[attr-defined]
