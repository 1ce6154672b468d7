"""Train the tiny model's language part on the tasks' texts, with words in place of its visual tokens."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration

from ..tasks import IMAGE_MARK
from .people import Person
from .texts import CELLS, draw_task, draw_text, write_cells


# Patch grid (time, rows, columns) of a crop with one visual token per cell: 2 columns x 4 rows, merged 2 x 2.
CELL_GRID = (1, 8, 4)
IMAGE_TOKENS = "<|vision_start|>" + "<|image_pad|>" * len(CELLS) + "<|vision_end|>"


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Padded token ids, mask and labels (B, L), and the word ids (cells, W) of all image cells, 0-padded."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    cell_words: torch.Tensor
    cell_mask: torch.Tensor


def _pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    padded = torch.full((len(rows), max(len(row) for row in rows)), value, dtype=torch.long)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.tensor(row, dtype=torch.long)
    return padded


def make_batch(
    task: str, people: Sequence[Person], tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator, size: int
) -> TextBatch:
    """Return a batch of random records of one task (one length, little padding); only answers carry labels."""
    ids: list[list[int]] = []
    labels: list[list[int]] = []
    words: list[list[int]] = []
    for _ in range(size):
        prompt, answer, shown = draw_text(task, people, rng)
        prompt_ids = tokenizer.encode(prompt.replace(IMAGE_MARK, IMAGE_TOKENS), add_special_tokens=False)
        answer_ids = tokenizer.encode(answer, add_special_tokens=False)
        ids.append(prompt_ids + answer_ids)
        labels.append([-100] * len(prompt_ids) + answer_ids)
        for person in shown:
            words += [tokenizer.encode(" " + cell, add_special_tokens=False) for cell in write_cells(person)]
    return TextBatch(
        _pad(ids, 0),
        _pad([[1] * len(row) for row in ids], 0),
        _pad(labels, -100),
        _pad(words, 0),
        _pad([[1] * len(row) for row in words], 0),
    )


def compute_loss(model: Qwen2VLForConditionalGeneration, batch: TextBatch) -> torch.Tensor:
    """Return the language loss, each visual token being the sum of its cell's word embeddings, plus noise."""
    embeddings = model.get_input_embeddings()
    cells = (embeddings(batch.cell_words) * batch.cell_mask[..., None]).sum(1)
    cells = cells + 0.3 * cells.detach().std() * torch.randn_like(cells)
    is_image = batch.input_ids == model.config.image_token_id
    embeds = embeddings(batch.input_ids)
    embeds = embeds.masked_scatter(is_image[..., None].expand_as(embeds), cells)
    grids = torch.tensor([CELL_GRID]).repeat(len(cells) // len(CELLS), 1)
    find_positions: Any = model.model.get_rope_index  # annotated with tensor types that nobody constructs
    position_ids, _ = find_positions(
        batch.input_ids, mm_token_type_ids=is_image.int(), image_grid_thw=grids, attention_mask=batch.attention_mask
    )
    return model(
        inputs_embeds=embeds, position_ids=position_ids, attention_mask=batch.attention_mask, labels=batch.labels
    ).loss


def warm_up(
    model: Qwen2VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    people: Sequence[Person],
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> list[float]:
    """Train the language part; the vision part gets no gradient. Return the loss of each step."""
    rng = np.random.default_rng(seed)
    parameters = [p for name, p in model.named_parameters() if "visual" not in name]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    losses: list[float] = []
    model.train()
    with tqdm(range(steps), desc="warm up the tiny decoder", unit="step", file=sys.stderr, mininterval=2) as progress:
        for step in progress:
            task = draw_task(rng, step / steps)
            loss = compute_loss(model, make_batch(task, people, tokenizer, rng, batch_size))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses
