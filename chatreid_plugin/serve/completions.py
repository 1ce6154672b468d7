"""One greedy answer of the model, with the log-probabilities of its tokens."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import GenerationConfig

from .bodies import Message, Part, RequestFault


IMAGE_TOKENS = "<|vision_start|><|image_pad|><|vision_end|>"
END = "<|im_end|>"
_SPECIAL = re.compile(r"<\|\w+\|>")
_LONGEST_SHOWN = 40
# More than any text of words has (about 4); longer ones are not even cut into tokens.
_CHARACTERS_PER_TOKEN = 16


@dataclass(frozen=True, slots=True)
class Token:
    """A token of the answer or an alternative to it."""

    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer.

    Attributes:
        text: without the end token.
        tokens: the answer's tokens, the end token included; empty unless log-probabilities were asked for.
        alternatives: for each token the likeliest ones at its place, best first.
        is_whole: the model ended it; else the limit did.
        prompt_tokens: how long the question was.
        answer_tokens: how long the answer is.
    """

    text: str
    tokens: tuple[Token, ...]
    alternatives: tuple[tuple[Token, ...], ...]
    is_whole: bool
    prompt_tokens: int
    answer_tokens: int


def render_messages(messages: Sequence[Message], system_prompt: str) -> str:
    """Return the prompt in ChatML, as LLaMA-Factory's templates write it; the checkpoint's own may know no images.

    Args:
        messages: the request's.
        system_prompt: what stands first where they do not bring their own; empty for nothing.

    Raises:
        RequestFault: a text holds one of the model's special tokens, or a part is empty.
    """
    turns = [(message.role, _render_content(message)) for message in messages]
    if turns[0][0] != "system" and system_prompt:
        turns = [("system", system_prompt), *turns]
    return "".join(f"<|im_start|>{role}\n{content}{END}\n" for role, content in turns) + "<|im_start|>assistant\n"


def _render_content(message: Message) -> str:
    parts = [Part(type="text", text=message.content)] if isinstance(message.content, str) else message.content
    # The texts between two images are one text for the tokenizer, however they are cut into parts.
    texts = [""]
    for part in parts:
        if part.type == "image_url":
            texts.append("")
        else:
            texts[-1] += part.text or ""
    for text in texts:
        check_words(text)
    return IMAGE_TOKENS.join(texts)


def check_words(text: str) -> None:
    """Refuse a text that would speak as the model or as the system.

    Raises:
        RequestFault: it holds one of the model's special tokens.
    """
    if found := _SPECIAL.search(text):
        raise RequestFault(f"A text holds {found.group()[:_LONGEST_SHOWN]}, a token of the model's own; take it out.")


def check_length(tokenizer: Any, text: str, further: int, longest: int) -> None:
    """Refuse a question that is too long, by arithmetic where that is enough.

    Args:
        tokenizer: the model's.
        text: all words of the question.
        further: tokens of its images and of the answer.
        longest: how many tokens question and answer may have.

    Raises:
        RequestFault: more tokens than ``longest``.
    """
    # Every token has a byte at least.
    if len(text.encode()) + further <= longest:
        return
    count, more = len(text) // _CHARACTERS_PER_TOKEN, "more than "
    if count + further <= longest:
        count, more = len(tokenizer.encode(text, add_special_tokens=False, verbose=False)), ""
    if count + further > longest:
        raise RequestFault(
            f"The words have {more}{count} tokens, images and answer {further}; {longest} together is most."
        )


@torch.inference_mode()
def complete(
    model: Any, processor: Any, text: str, images: Sequence[Image.Image], limit: int, alternatives: int | None
) -> Completion:
    """Return the greedy answer.

    Args:
        model: in evaluation mode.
        processor: its own.
        text: of ``render_messages``.
        images: already resized by the image policy.
        limit: most tokens of the answer; ``check_length`` has found that they fit.
        alternatives: how many likeliest tokens are wanted at each place; None for no log-probabilities.
    """
    inputs = _prepare_inputs(model, processor, text, images)
    ids = inputs["input_ids"]
    tokenizer = processor.tokenizer
    ends = {tokenizer.convert_tokens_to_ids(END), tokenizer.eos_token_id} - {None}
    settings = _make_greedy_settings(limit, ends, tokenizer.pad_token_id, with_logits=alternatives is not None)
    output = model.generate(**inputs, generation_config=settings)
    answer: list[int] = output.sequences[0, ids.shape[1] :].tolist()
    is_whole = answer[-1] in ends
    text = tokenizer.decode(answer[:-1] if is_whole else answer)
    rows: list[tuple[Token, tuple[Token, ...]]] = []
    if alternatives is not None:
        rows = [_list_tokens(model, tokenizer, output, i, alternatives, token) for i, token in enumerate(answer)]
    return Completion(
        text,
        tuple(row[0] for row in rows),
        tuple(row[1] for row in rows),
        is_whole,
        ids.shape[1],
        len(answer),
    )


def _prepare_inputs(model: Any, processor: Any, text: str, images: Sequence[Image.Image]) -> Any:
    inputs = processor(text=[text], images=list(images) or None, return_tensors="pt").to(model.device)
    if images:
        # Without them transformers gives image tokens positions in one dimension, unlike in training, silently.
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
    return inputs


def _make_greedy_settings(limit: int, ends: Iterable[int], padding: int, *, with_logits: bool) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=limit,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=sorted(ends),
        pad_token_id=padding,
        return_dict_in_generate=True,
        output_logits=with_logits,
        output_hidden_states=with_logits,
    )


def _list_tokens(
    model: Any, tokenizer: Any, output: Any, step: int, alternatives: int, chosen: int
) -> tuple[Token, tuple[Token, ...]]:
    """Return a step's token and the likeliest ones.

    The model's own logits are rounded to its dtype: in bf16 Yes and No would tie by the thousand. Those that are
    returned are computed again in fp32; the others only sum up.
    """
    logits = output.logits[step][0].float()
    hidden = output.hidden_states[step][-1][0, -1].float()
    best = torch.topk(logits, min(max(alternatives, 1), len(logits))).indices
    ids = torch.cat([best, torch.tensor([chosen], device=best.device)])
    exact = model.get_output_embeddings().weight[ids].float() @ hidden
    values = (exact - torch.logsumexp(logits, 0)).tolist()
    tokens = [Token(tokenizer.decode([token]), value) for token, value in zip(ids.tolist(), values, strict=True)]
    ranked = sorted(tokens[:-1], key=lambda token: -token.logprob)
    return tokens[-1], tuple(ranked[:alternatives])
