"""Positions of image tokens in generation: the HF engine of ``chat`` and ``api`` and the evaluator agree."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from chatreid_plugin.datasets.benchmark import make_image_query
from chatreid_plugin.eval.questions import IMAGE_PAIR
from chatreid_plugin.records import ImageRecord
from tests.support import make_eval_settings


TOKEN_TYPES = "mm_token_type_ids"
PLUGIN = "chatreid_plugin.training.template"


def test_several_answers_to_one_question_share_the_positions(service: Any) -> None:
    record = service.make_record("gallery")
    several = service.ask(record, num_return_sequences=2)
    one = service.ask(record)
    assert torch.equal(several.positions[0], one.positions[0].expand(-1, 2, -1))


@torch.inference_mode()
@pytest.mark.parametrize("name", ["pair", "square"])
def test_evaluator_scores_with_the_positions_and_logits_of_chat(name: str, service: Any, tmp_path: Path) -> None:
    from chatreid_plugin.eval.backends.transformers import TransformersScorer

    settings = make_eval_settings(
        {"protocol": "folder", "manifest": "m.parquet", "device": "cpu"}
        | {"model_name_or_path": str(service.checkpoint.folder)}
        | {"output_dir": tmp_path, "chatreid_stage": 3, "dtype": "float32"}
    )
    scorer = TransformersScorer(settings.model, service.images)
    record = service.make_record(name)
    query, candidate = (
        ImageRecord(image.path, "t", "gallery", image.path, "t:1", "1", image.width, image.height)
        for image in record.images
    )
    with service.trace(scorer.model) as scored:
        (margin,) = scorer.score_pairs(make_image_query(query), [candidate], IMAGE_PAIR)
    asked = service.ask(record)
    assert torch.equal(scored.all_positions, asked.positions[0])
    yes, no = (scorer.processor.tokenizer.convert_tokens_to_ids(word) for word in ("Yes", "No"))
    assert margin == pytest.approx(float(asked.logits[0][0, yes] - asked.logits[0][0, no]), abs=1e-4)


def test_stock_template_still_generates_with_positions_of_words(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 1. When this fails, LLaMA-Factory passes the token types itself and extend_collator can go."""
    from llamafactory.data.template import TEMPLATES

    record = service.make_record("pair")
    ours = service.ask(record)
    monkeypatch.setattr(service.chat.engine, "template", TEMPLATES[service.checkpoint.stock])
    stock = service.ask(record)
    assert stock.input_ids[0].tolist() == ours.input_ids[0].tolist()
    message = "LLaMA-Factory's HF engine places image tokens rightly now: remove extend_collator and get_mm_inputs."
    words = torch.arange(stock.positions[0].shape[-1]).expand(3, 1, -1)
    assert torch.equal(stock.positions[0], words), message
    assert int(ours.positions[0].max()) < int(words.max())
    assert not torch.allclose(stock.logits[0], ours.logits[0], atol=1e-3)


def test_chat_without_images_gets_no_token_types(service: Any) -> None:
    found = service.template.mm_plugin.get_mm_inputs(
        [], [], [], [0], [0], [0], [[5, 6]], service.chat.engine.processor
    )
    assert TOKEN_TYPES not in found


def test_older_transformers_get_no_token_types(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their generate refuses the argument, and finds the images itself."""
    from transformers import Qwen2VLModel

    from chatreid_plugin.training.compat import takes_token_types

    def get_rope_index(self: Any, input_ids: Any, image_grid_thw: Any = None) -> None: ...

    assert takes_token_types()
    monkeypatch.setattr(Qwen2VLModel, "get_rope_index", get_rope_index)
    assert not takes_token_types.__wrapped__()
    monkeypatch.setattr(f"{PLUGIN}.takes_token_types", takes_token_types.__wrapped__)
    white, processor = Image.new("RGB", (64, 64)), service.chat.engine.processor
    found = service.template.mm_plugin.get_mm_inputs([white], [], [], [1], [0], [0], [[5, 6]], processor)
    assert list(found) == ["pixel_values", "image_grid_thw"]
