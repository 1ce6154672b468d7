"""The tiny model: real files that transformers loads by itself, one token for each answer, a decoder that learns."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from chatreid_plugin.demo.people import sample_people
from chatreid_plugin.demo.tiny_model import SPECIAL_TOKENS, Family, TinySizes, write_tiny_model
from chatreid_plugin.tasks import format_chat_prompt


SIZES = TinySizes(hidden=64, layers=2, vision_layers=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path, sample_people(20, 0), sizes=SIZES)
    return path


def test_tokenizer_has_qwen2_special_tokens_and_single_answer_tokens(folder: Path) -> None:
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    for token in (*SPECIAL_TOKENS, "Yes", "No", "A", "Z"):
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1, token
    assert tokenizer.decode(tokenizer.encode("A young woman, größe 38!", add_special_tokens=False)) == (
        "A young woman, größe 38!"
    )


def test_chat_template_equals_the_prompt_of_the_task_table(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": " who is this?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == format_chat_prompt("<|vision_start|><|image_pad|><|vision_end|> who is this?")


def test_model_reads_an_image_and_writes_a_reply(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    text = format_chat_prompt("<|vision_start|><|image_pad|><|vision_end|>")
    inputs = processor(text=[text], images=[Image.new("RGB", (64, 128), "red")], return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 8
    reply = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert reply.shape[1] > inputs["input_ids"].shape[1]


def test_same_seed_gives_the_same_weights(folder: Path, tmp_path: Path) -> None:
    write_tiny_model(tmp_path, sample_people(20, 0), sizes=SIZES)
    first, second = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_warm_up_teaches_the_decoder_and_leaves_the_encoder(folder: Path, tmp_path: Path) -> None:
    losses = write_tiny_model(tmp_path, sample_people(20, 0), sizes=SIZES, warm_up_steps=30)
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    fresh, warm = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    changed = {name for name in fresh if not torch.equal(fresh[name], warm[name])}
    assert changed
    assert not any("visual" in name for name in changed)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_every_family_loads_by_its_files_and_sees_the_picture(family: Family, tmp_path: Path) -> None:
    write_tiny_model(tmp_path, sample_people(20, 0), sizes=TinySizes(vision_layers=2), family=family)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert model.config.model_type == family
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Yes or No?"}]}]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    assert text.startswith("<|im_start|>user" if family == "qwen3_vl" else "<|im_start|>system")
    logits: list[torch.Tensor] = []
    for colour in ("red", "blue"):
        inputs = processor(text=[text], images=[Image.new("RGB", (128, 256), colour)], return_tensors="pt")
        with torch.inference_mode():
            logits.append(model(**inputs).logits[0, -1])
    assert not torch.allclose(logits[0], logits[1])
