"""The chat templates ``chatreid``: the base model's own template with the ChatReID image plugin."""

import copy
import dataclasses
from functools import wraps
from types import ModuleType
from typing import Any

from ..images import ImagePolicy
from ..upstream import get_upstream
from .compat import get_function
from .mm_plugin import QWEN2_PLUGIN, QWEN3_PLUGIN, ChatReIDPlugin


# Our template's name -> the LLaMA-Factory template whose chat format it keeps, and the image plugin. Qwen3-VL is asked
# without thinking: the recipe's answers are a word or a few letters.
TEMPLATES = {
    "chatreid": ("qwen2_vl", QWEN2_PLUGIN),
    "chatreid_qwen2_5_vl": ("qwen2_vl", QWEN2_PLUGIN),
    "chatreid_qwen3_vl": ("qwen3_vl_nothink", QWEN3_PLUGIN),
}


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
