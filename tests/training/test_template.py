from typing import Any

import pytest

from chatreid_plugin.errors import ConfigError
from chatreid_plugin.images import ImagePolicy
from chatreid_plugin.tasks import format_chat_prompt


# `chatreid_plugin.training.arguments` and `.template` extend classes of LLaMA-Factory, which loads them itself.


def make_arguments(**values: Any) -> Any:
    from llamafactory.hparams.parser import DataArguments

    return DataArguments(**values)


def fetch(tokenizer: Any, data_args: Any) -> Any:
    from llamafactory.data import get_template_and_fix_tokenizer

    return get_template_and_fix_tokenizer(tokenizer, data_args)


def test_template_is_qwen2_vls_with_our_plugin(tokenizer_module: dict[str, Any]) -> None:
    from llamafactory.data.template import TEMPLATES

    from chatreid_plugin.training.template import ChatReIDPlugin

    ours, stock = TEMPLATES["chatreid"], TEMPLATES["qwen2_vl"]
    differences = {name for name, value in vars(stock).items() if vars(ours)[name] != value}
    assert differences == {"mm_plugin"}
    assert isinstance(ours.mm_plugin, ChatReIDPlugin)
    assert not isinstance(stock.mm_plugin, ChatReIDPlugin)
    assert ours.mm_plugin.image_token == stock.mm_plugin.image_token
    assert ours.mm_plugin.vision_bos_token == stock.mm_plugin.vision_bos_token


def test_policy_follows_the_keys_of_each_fetch(tokenizer_module: dict[str, Any]) -> None:
    tokenizer = tokenizer_module["tokenizer"]
    for stage in (1, 2, 3):
        for aspect in ("stretch", "keep"):
            arguments = make_arguments(template="chatreid", chatreid_stage=stage, chatreid_aspect=aspect)
            assert fetch(tokenizer, arguments).mm_plugin.policy == ImagePolicy(stage, aspect)
    assert fetch(tokenizer, make_arguments(template="chatreid")).mm_plugin.policy == ImagePolicy()


def test_stock_arguments_made_in_python_know_no_stage(tokenizer_module: dict[str, Any]) -> None:
    from llamafactory.hparams.data_args import DataArguments

    template = fetch(tokenizer_module["tokenizer"], DataArguments(template="chatreid"))
    assert template.mm_plugin.policy == ImagePolicy()


def test_other_templates_are_left_alone(tokenizer_module: dict[str, Any]) -> None:
    template = fetch(tokenizer_module["tokenizer"], make_arguments(template="qwen2_vl"))
    assert not hasattr(template.mm_plugin, "policy")
    with pytest.raises(ConfigError):
        make_arguments(template="qwen2_vl", chatreid_stage=1)


def test_prompt_is_the_one_that_evaluation_writes(tokenizer_module: dict[str, Any]) -> None:
    tokenizer = tokenizer_module["tokenizer"]
    template = fetch(tokenizer, make_arguments(template="chatreid"))
    messages = [{"role": "user", "content": "Same person?"}, {"role": "assistant", "content": "Yes"}]
    ((prompt, answer),) = template.encode_multiturn(tokenizer, messages)
    assert tokenizer.decode(prompt) == format_chat_prompt("Same person?")
    assert tokenizer.decode(answer) == "Yes<|im_end|>\n"
