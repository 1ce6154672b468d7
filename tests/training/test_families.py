"""Qwen2.5-VL and Qwen3-VL beside Qwen2-VL: the same tokens as stock, the same swap, every parameter in its part."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from chatreid_plugin.answers import render_answer
from chatreid_plugin.demo.people import sample_people
from chatreid_plugin.demo.tiny_model import Family, TinySizes, write_tiny_model
from chatreid_plugin.errors import ConfigError
from chatreid_plugin.images import apply_stage_policy
from chatreid_plugin.records import Answer, ImageReference, Instruction, convert_instruction_to_row
from chatreid_plugin.tasks import render_prompt
from chatreid_plugin.training.checkpoint import compose_checkpoint, find_vision_suffix
from chatreid_plugin.training.loader import ORIGIN_COLUMN, LazyTokenizer
from chatreid_plugin.training.model import check_trainable, find_part


# Our template, and the stock one whose tokens it has to give.
TEMPLATES: dict[Family, tuple[str, str]] = {
    "qwen2_vl": ("chatreid", "qwen2_vl"),
    "qwen2_5_vl": ("chatreid_qwen2_5_vl", "qwen2_vl"),
    "qwen3_vl": ("chatreid_qwen3_vl", "qwen3_vl_nothink"),
}
SIZES = [(64, 128), (33, 190), (128, 256), (300, 600), (20, 20), (193, 384), (500, 90)]


@dataclass(frozen=True)
class Made:
    """A family's two tiny checkpoints, its tokenizer and processor as LLaMA-Factory loads them, and its template."""

    family: Family
    folder: Path
    other: Path
    module: dict[str, Any]


@pytest.fixture(scope="module", params=list(TEMPLATES))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    from llamafactory.hparams import ModelArguments
    from llamafactory.model import load_tokenizer

    root = tmp_path_factory.mktemp(request.param)
    patch = 16 if request.param == "qwen3_vl" else 14
    sizes = TinySizes(
        hidden=32, layers=2, heads=2, vision_hidden=32, vision_layers=2, patch_size=patch, vocabulary=600
    )
    for seed, name in enumerate(("model", "other")):
        write_tiny_model(root / name, sample_people(20, 7), sizes=sizes, seed=seed, family=request.param)
    module = load_tokenizer(ModelArguments(model_name_or_path=str(root / "model")))
    return Made(request.param, root / "model", root / "other", module)


def make_noise(size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(size).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_processor(made: Made, template: str, stage: int | None) -> tuple[Any, Any]:
    from llamafactory.data.loader import _get_dataset_processor
    from llamafactory.data.template import get_template_and_fix_tokenizer
    from llamafactory.hparams.parser import DataArguments

    data_args = DataArguments(template=template, chatreid_stage=stage)
    data_args.packing = False
    fetched = get_template_and_fix_tokenizer(made.module["tokenizer"], data_args)
    tokenizer, processor = made.module["tokenizer"], made.module["processor"]
    return _get_dataset_processor(data_args, "sft", fetched, tokenizer, processor), fetched


def get_pixels(made: Made, row: dict[str, Any], template: Any) -> dict[str, torch.Tensor]:
    count, ids = [len(row["images"])], [row["input_ids"]]
    return template.mm_plugin.get_mm_inputs(row["images"], [], [], count, [0], [0], ids, made.module["processor"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_same_tokens_and_pixels_as_the_stock_template(made: Made, stage: int, tmp_path: Path) -> None:
    for width, height in SIZES:
        make_noise((width, height)).save(tmp_path / f"{width}x{height}.png")
    images = tuple(ImageReference(f"{width}x{height}.png", width, height) for width, height in SIZES)
    record = Instruction("r", "standard_reid", images, 1, Answer(indices=(0, 2)), dataset="tiny")
    ours, stock = TEMPLATES[made.family]
    processor, template = make_processor(made, ours, stage)
    columns = {name: [value] for name, value in convert_instruction_to_row(record).items()} | {ORIGIN_COLUMN: [0]}
    batch = LazyTokenizer(processor, [(str(tmp_path), ())])(columns)
    row = {name: values[0] for name, values in batch.items()}

    resized: list[Image.Image] = []
    for size in SIZES:
        target = apply_stage_policy(*size, stage, "stretch")
        resized.append(make_noise(size) if target == size else make_noise(size).resize(target))
    stock_processor, stock_template = make_processor(made, stock, None)
    talk: dict[str, Any] = {
        "_prompt": [[{"role": "user", "content": render_prompt(record)}]],
        "_response": [[{"role": "assistant", "content": render_answer(record)}]],
    }
    talk |= {"_system": [""], "_tools": [""], "_images": [resized], "_videos": [None], "_audios": [None]}
    stock_row = {name: values[0] for name, values in stock_processor.preprocess_dataset(talk).items()}
    assert list(row["input_ids"]) == list(stock_row["input_ids"])
    assert list(row["labels"]) == list(stock_row["labels"])
    mine, theirs = get_pixels(made, row, template), get_pixels(made, stock_row, stock_template)
    assert torch.equal(mine["image_grid_thw"], theirs["image_grid_thw"])
    assert torch.equal(mine["pixel_values"], theirs["pixel_values"])


def test_training_refuses_the_template_of_another_family(made: Made, parse: Any) -> None:
    other = "chatreid" if made.family == "qwen3_vl" else "chatreid_qwen3_vl"
    with pytest.raises(ConfigError, match=f"template {other} is not of the model's family {made.family}"):
        parse(1, model_name_or_path=str(made.folder), template=other)
    assert parse(1, model_name_or_path=str(made.folder), template=TEMPLATES[made.family][0])


def test_template_has_the_familys_system_prompt(made: Made) -> None:
    _, template = make_processor(made, TEMPLATES[made.family][0], 3)
    talk = [{"role": "user", "content": "Same?"}, {"role": "assistant", "content": "Yes"}]
    ((prompt, _),) = template.encode_multiturn(made.module["tokenizer"], talk)
    expected = made.module["processor"].apply_chat_template(talk[:1], add_generation_prompt=True, tokenize=False)
    assert made.module["tokenizer"].decode(prompt) == expected


def test_swap_takes_every_vision_tensor_and_nothing_else(made: Made, tmp_path: Path) -> None:
    compose_checkpoint(made.other, made.folder, tmp_path / "composed", "encoder")
    composed, encoder, decoder = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "composed", made.other, made.folder)
    )
    assert composed.keys() == decoder.keys()
    for name, tensor in composed.items():
        assert torch.equal(tensor, (decoder if find_vision_suffix(name) is None else encoder)[name]), name
    vision = {name.split("visual.")[1].split(".")[0] for name in composed if find_vision_suffix(name) is not None}
    wanted = {"patch_embed", "blocks", "merger"}
    assert vision == (wanted | {"pos_embed", "deepstack_merger_list"} if made.family == "qwen3_vl" else wanted)


def test_swap_refuses_another_family(made: Made, workshop: Any, tmp_path: Path) -> None:
    if made.family == "qwen2_vl":
        compose_checkpoint(workshop.other_model, made.folder, tmp_path / "composed", "encoder")
        return
    with pytest.raises(ConfigError, match=made.family):
        compose_checkpoint(workshop.model, made.folder, tmp_path / "composed", "encoder")
    assert not (tmp_path / "composed").exists()


def test_llamafactory_freezes_exactly_what_stage_3_freezes(made: Made) -> None:
    from llamafactory.hparams import FinetuningArguments
    from llamafactory.model.model_utils.visual import COMPOSITE_MODELS, get_forbidden_modules
    from transformers import AutoConfig, AutoModelForImageTextToText

    assert made.family in COMPOSITE_MODELS
    arguments = FinetuningArguments(freeze_vision_tower=True, freeze_multi_modal_projector=True)
    forbidden = get_forbidden_modules(AutoConfig.from_pretrained(made.folder), arguments)
    model = AutoModelForImageTextToText.from_pretrained(made.folder)
    names = [name for name, _ in model.named_parameters()]
    trainable = [(name, not any(part in name for part in forbidden)) for name in names]
    check_trainable(trainable, 3, "encoder", "full")
    assert {find_part(name) for name, trains in trainable if trains} == {"language"}
    assert {find_part(name) for name, trains in trainable if not trains} == {"vision", "projector"}
