"""Traps of images and their tokens: positions, damaged and unusual files, pixel limits, text without images."""

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import ExifTags, Image

from chatreid_plugin.errors import DataError
from chatreid_plugin.images import (
    DEFAULT_IMAGE_MAX_PIXELS,
    DEFAULT_IMAGE_MIN_PIXELS,
    ImagePolicy,
    count_visual_tokens,
)
from chatreid_plugin.records import Answer
from chatreid_plugin.tasks import IMAGE_MARK, clean_text
from chatreid_plugin.training.images import decode_image, read_size
from chatreid_plugin.training.loader import convert_record


ROOT = Path(__file__).parents[3]


def see_positions(model: Any, **inputs: Any) -> torch.Tensor:
    """Return the position ids (3, B, L) with which ``generate`` reads a prompt."""
    seen: list[torch.Tensor] = []

    def look(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        seen.append(named["position_ids"][-3:])

    handle = model.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        model.generate(**inputs, max_new_tokens=1)
    finally:
        handle.remove()
    return seen[0]


def test_trap_01_generation_has_the_image_positions_of_training(
    data: Any, model: Any, collate: Callable[..., Any], tokenizer_module: dict[str, Any]
) -> None:
    """``tests/training/positions`` goes through chat, api, predict_with_generate and the evaluator."""
    from llamafactory.data.template import TEMPLATES

    row = data.load([data.make("r1")])[0]
    ids, processor = torch.tensor([row["input_ids"]]), tokenizer_module["processor"]
    trained = collate(row)["position_ids"][-3:, :, : ids.shape[1]]
    plugin = TEMPLATES["chatreid"].mm_plugin
    inputs = plugin.get_mm_inputs(row["images"], [], [], [4], [0], [0], [row["input_ids"]], processor)
    assert "mm_token_type_ids" in inputs
    tensors = {name: torch.as_tensor(value) for name, value in inputs.items()}
    tensors |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(see_positions(model, **tensors), trained)
    del tensors["mm_token_type_ids"]  # as stock LLaMA-Factory
    assert not torch.equal(see_positions(model, **tensors), trained)


def test_trap_02_cutoff_never_cuts_image_tokens(
    data: Any, parse: Callable[..., Any], tokenizer_module: dict[str, Any]
) -> None:
    from llamafactory.data import get_template_and_fix_tokenizer, loader

    tokenizer = tokenizer_module["tokenizer"]
    arguments = parse(3, cutoff_len=4096).data
    processor = loader._get_dataset_processor(
        arguments, "sft", get_template_and_fix_tokenizer(tokenizer, arguments), **tokenizer_module
    )
    record = data.make("r1")
    aligned = convert_record(record, str(data.images))

    def encode() -> Any:
        return processor.preprocess_dataset({name: [value] for name, value in aligned.items()})

    def list_runs(ids: list[int]) -> list[int]:
        image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        return [len(list(run)) for token, run in groupby(ids) if token == image]

    whole = encode()
    length, runs = len(whole["input_ids"][0]), list_runs(whole["input_ids"][0])
    outcomes: set[int | str] = set()
    for cutoff in range(length, 30, -3):
        arguments.cutoff_len = cutoff
        try:
            found = encode()
        except DataError as error:
            assert f"but cutoff_len is {cutoff}" in str(error)
            outcomes.add("refused")
        else:
            kept = list_runs(found["input_ids"][0])
            assert kept == runs[: len(kept)]
            assert len(found["input_ids"][0]) <= cutoff and found["labels"][0][-2:] == whole["labels"][0][-2:]
            outcomes.add(len(kept))
    assert outcomes == {4, 3, "refused"}  # whole, trimmed by one image, and too short for a question


def test_trap_07_a_damaged_file_is_named_or_its_record_replaced(data: Any, collate: Callable[..., Any]) -> None:
    damaged = data.images / "3.jpg"
    damaged.write_bytes(damaged.read_bytes()[:700])
    records = [data.make("whole", 3), data.make("damaged", 4)]
    row = data.load(records)[1]
    with pytest.raises(DataError, match=r"3\.jpg \(record damaged\)"):
        collate(row)
    skipped = data.load(records, chatreid_bad_image="skip")[1]
    assert {image["record"] for image in skipped["images"]} == {"whole"}
    assert torch.isfinite(collate(skipped)["pixel_values"]).all()


@pytest.mark.parametrize("kind", ["16 bits", "12 bits", "float"])
def test_trap_08_deep_infrared_is_not_white(tmp_path: Path, kind: str) -> None:
    ramp = np.tile(np.linspace(0, 1, 128), (64, 1))
    path = tmp_path / "infrared.tif"
    if kind == "float":
        Image.fromarray(ramp.astype(np.float32)).save(path)
    else:
        Image.fromarray((ramp * (65535 if kind == "16 bits" else 4095)).astype(np.uint16)).save(path)
    stock = np.asarray(Image.open(path).convert("RGB"), dtype=float)
    assert not 100 < stock.mean() < 155  # white, or black
    found = np.asarray(decode_image(str(path)), dtype=float)
    assert abs(found - 255 * ramp[:, :, None]).max() < 2


def test_trap_09_photographs_are_upright_in_counts_and_pixels_alike(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turned by a quarter
    Image.new("RGB", (128, 64)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_size(str(tmp_path / "turned.jpg")) == (64, 128)
    assert decode_image(str(tmp_path / "turned.jpg")).size == (64, 128)


def test_trap_10_pixel_limits_are_areas_and_the_same_in_every_shipped_file() -> None:
    assert [count_visual_tokens(*size, ImagePolicy()) for size in ((64, 128), (128, 256))] == [10, 45]
    enlarged = ImagePolicy(image_min_pixels=32768)
    assert count_visual_tokens(64, 128, enlarged) == 45
    limits = {
        (values["image_max_pixels"], values["image_min_pixels"])
        for path in (ROOT / "examples").rglob("*.yaml")
        if str((values := yaml.safe_load(path.read_text())).get("template", "")).startswith("chatreid")
        and "export_dir" not in values  # it opens no image
    }
    stock = {"image_max_pixels": DEFAULT_IMAGE_MAX_PIXELS, "image_min_pixels": DEFAULT_IMAGE_MIN_PIXELS}
    for path in (ROOT / "eval").glob("*.yaml"):
        values = stock | yaml.safe_load(path.read_text())
        limits.add((values["image_max_pixels"], values["image_min_pixels"]))
    assert limits == {(DEFAULT_IMAGE_MAX_PIXELS, DEFAULT_IMAGE_MIN_PIXELS)}


def test_trap_15_a_batch_without_images_still_trains_the_vision_tower(
    model: Any, collate: Callable[..., Any], tokenizer_module: dict[str, Any]
) -> None:
    """A process whose batch skipped the tower would wait for the others under ZeRO-3 and FSDP."""
    ids = tokenizer_module["tokenizer"].encode("Say yes. Yes", add_special_tokens=False)
    row = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids, "images": None}
    batch = collate(row)
    assert batch["image_grid_thw"].shape == (1, 3)
    model.zero_grad()
    model(**batch).loss.backward()
    assert all(value.grad is not None for name, value in model.named_parameters() if "visual." in name)
    model.zero_grad()


def test_trap_16_marks_in_texts_are_no_images(data: Any, tokenizer_module: dict[str, Any]) -> None:
    marked = f"A man {IMAGE_MARK} with <ima<image>ge> a <|image_pad|>hat<|vision_end|><video>"
    clean = clean_text(marked)
    assert clean == "A man  with  a hat"
    tasks: list[dict[str, Any]] = [
        {"task": "image_captioning", "query_images": 1, "answer": Answer(text=marked)},
        {"task": "text_to_image_one_to_one", "query_images": 1, "captions": (marked,), "answer": Answer(match=True)},
    ]
    rows = data.load([data.make(f"r{number}", 1, **task) for number, task in enumerate(tasks)])
    for number in range(len(tasks)):
        text = tokenizer_module["tokenizer"].decode(rows[number]["input_ids"])
        assert text.count("<|vision_start|>") == text.count("<|vision_end|>") == 1
        assert text.count("<|image_pad|>") == count_visual_tokens(56, 112, ImagePolicy(3))
