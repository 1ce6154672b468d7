"""The image plugin: parity with stock Qwen2-VL, no decoding at tokenization, and what it says of damaged files."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageFile

from chatreid_plugin.answers import render_answer
from chatreid_plugin.errors import DataError
from chatreid_plugin.images import Aspect, ImagePolicy, apply_stage_policy, resize_by_policy
from chatreid_plugin.records import Answer, ImageReference, Instruction, convert_instruction_to_row
from chatreid_plugin.tasks import render_prompt
from chatreid_plugin.training.loader import ORIGIN_COLUMN, LazyTokenizer


THRESHOLDS = [
    *((128, 256), (127, 256), (128, 255), (129, 256), (256, 128), (64, 512), (1, 1), (2, 900)),
    *((192, 384), (193, 384), (191, 384), (192, 385), (384, 192), (300, 246), (27, 28), (768, 768), (900, 700)),
    *((28, 28), (29, 300), (64, 128), (600, 40), (56, 56)),
]
RANDOM = Random(20250)
SIZES = [*THRESHOLDS, *((RANDOM.randint(20, 330), RANDOM.randint(20, 650)) for _ in range(20))]


def make_noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("noise")
    for width, height in SIZES:
        make_noise(width, height).save(folder / f"{width}x{height}.png")
    return folder


def make_record(sizes: list[tuple[int, int]], stated: bool = True) -> Instruction:
    images = [ImageReference(f"{w}x{h}.png", w, h) if stated else ImageReference(f"{w}x{h}.png") for w, h in sizes]
    return Instruction("record-1", "standard_reid", tuple(images), 1, Answer(indices=(0,)), dataset="tiny")


def make_template(tokenizer: Any, name: str, stage: int | None = None, aspect: str = "stretch") -> tuple[Any, Any]:
    from llamafactory.data.template import get_template_and_fix_tokenizer
    from llamafactory.hparams.parser import DataArguments

    data_args = DataArguments(template=name, chatreid_stage=stage, chatreid_aspect=aspect)
    data_args.packing = False
    return get_template_and_fix_tokenizer(tokenizer, data_args), data_args


def tokenize(module: dict[str, Any], record: Instruction, root: Path, stage: int | None, aspect: str) -> Any:
    """Return (row, template): the record through our template, as lazy training tokenizes it."""
    from llamafactory.data.loader import _get_dataset_processor

    template, data_args = make_template(module["tokenizer"], "chatreid", stage, aspect)
    processor = _get_dataset_processor(data_args, "sft", template, module["tokenizer"], module["processor"])
    columns = {name: [value] for name, value in convert_instruction_to_row(record).items()} | {ORIGIN_COLUMN: [0]}
    batch = LazyTokenizer(processor, [(str(root), ())])(columns)
    return {name: values[0] for name, values in batch.items()}, template


def tokenize_stock(module: dict[str, Any], record: Instruction, images: list[Image.Image]) -> Any:
    """Return (row, template): the same conversation through LLaMA-Factory's own template and plain images."""
    from llamafactory.data.loader import _get_dataset_processor

    template, data_args = make_template(module["tokenizer"], "qwen2_vl")
    processor = _get_dataset_processor(data_args, "sft", template, module["tokenizer"], module["processor"])
    columns = {
        "_prompt": [[{"role": "user", "content": render_prompt(record)}]],
        "_response": [[{"role": "assistant", "content": render_answer(record)}]],
        "_system": [""],
        "_tools": [""],
        "_images": [images],
        "_videos": [None],
        "_audios": [None],
    }
    return {name: values[0] for name, values in processor.preprocess_dataset(columns).items()}, template


def get_pixels(module: dict[str, Any], row: Any, template: Any) -> dict[str, torch.Tensor]:
    count = [len(row["images"])]
    return template.mm_plugin.get_mm_inputs(
        row["images"], [], [], count, [0], [0], [row["input_ids"]], module["processor"]
    )


def call_transformers(folder: Path, record: Instruction, images: list[Image.Image]) -> dict[str, torch.Tensor]:
    """Return transformers' own Qwen2VLProcessor call; no LLaMA-Factory in it."""
    from transformers import Qwen2VLProcessor

    processor: Any = Qwen2VLProcessor.from_pretrained(folder)
    before, *rest = render_prompt(record).split("<image>")
    content: list[dict[str, str]] = [{"type": "text", "text": before}]
    for text in rest:
        content += [{"type": "image"}, {"type": "text", "text": text}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": render_answer(record)},
    ]
    text = processor.apply_chat_template(messages, tokenize=False)
    return processor(text=[text], images=images, return_tensors="pt")


def resize(size: tuple[int, int], policy: ImagePolicy) -> Image.Image:
    image = make_noise(*size)
    target = resize_by_policy(*size, policy)
    return image if target == size else image.resize(target)


CASES = [(stage, aspect) for stage in (1, 2, 3) for aspect in ("stretch", "keep")]


@pytest.mark.parametrize(("stage", "aspect"), CASES)
def test_same_inputs_as_stock_template_on_images_resized_first(
    tokenizer_module: dict[str, Any], noise: Path, stage: int, aspect: Aspect
) -> None:
    """LLaMA-Factory's own limits are left to it: the image is resized by the stage's policy alone."""
    for first in range(0, len(SIZES), 3):
        sizes = SIZES[first : first + 3]
        record = make_record(sizes)
        row, template = tokenize(tokenizer_module, record, noise, stage, aspect)
        resized: list[Image.Image] = []
        for size in sizes:
            target = apply_stage_policy(*size, stage, aspect)
            resized.append(make_noise(*size) if target == size else make_noise(*size).resize(target))
        stock_row, stock = tokenize_stock(tokenizer_module, record, resized)
        assert row["input_ids"] == stock_row["input_ids"], sizes
        assert row["labels"] == stock_row["labels"]
        ours = get_pixels(tokenizer_module, row, template)
        theirs = get_pixels(tokenizer_module, stock_row, stock)
        assert ours.keys() == theirs.keys() | {"mm_token_type_ids"}  # for generation; see positions/
        assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


@pytest.mark.parametrize(("stage", "aspect"), CASES)
def test_same_inputs_as_transformers_processor_on_images_resized_first(
    tokenizer_module: dict[str, Any], workshop: Any, noise: Path, stage: int, aspect: Aspect
) -> None:
    policy = ImagePolicy(stage, aspect)
    # Where LLaMA-Factory's own limits resize the policy's result once more, two resizes cannot equal one.
    sizes = [s for s in SIZES if apply_stage_policy(*s, stage, aspect) in (s, resize_by_policy(*s, policy))]
    assert len(sizes) > 30
    for first in range(0, len(sizes), 3):
        record = make_record(sizes[first : first + 3])
        row, template = tokenize(tokenizer_module, record, noise, stage, aspect)
        ours = get_pixels(tokenizer_module, row, template)
        images = [resize(size, policy) for size in sizes[first : first + 3]]
        theirs = call_transformers(workshop.model, record, images)
        assert row["input_ids"] == theirs["input_ids"][0].tolist()
        assert ours["mm_token_type_ids"] == theirs["mm_token_type_ids"].tolist()
        assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


def test_stages_differ(tokenizer_module: dict[str, Any], noise: Path) -> None:
    """The parity tests would pass for a policy that does nothing on both sides; this one would not."""
    record = make_record([(64, 128), (300, 246)])
    rows = [tokenize(tokenizer_module, record, noise, stage, "stretch")[0] for stage in (1, 2, 3)]
    lengths = [len(row["input_ids"]) for row in rows]
    # Stage 1 enlarges the small crop; Stage 2 leaves it, and 300 x 246 is just above its 384 x 192.
    assert lengths[0] > lengths[2]
    assert rows[1]["input_ids"] != rows[2]["input_ids"] or lengths[1] != lengths[2]


@pytest.fixture
def no_pixels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make every way to an image's pixels raise."""

    def fail(self: Any, *arguments: Any, **options: Any) -> Any:
        raise AssertionError("pixels were decoded")

    for owner in (Image.Image, ImageFile.ImageFile):
        monkeypatch.setattr(owner, "load", fail)
    monkeypatch.setattr(Image.Image, "resize", fail)
    monkeypatch.setattr(Image.Image, "convert", fail)
    yield


@pytest.mark.usefixtures("no_pixels")
@pytest.mark.parametrize("stated", [True, False])
def test_tokenization_decodes_no_pixels(tokenizer_module: dict[str, Any], noise: Path, stated: bool) -> None:
    record = make_record([(64, 128), (300, 246), (29, 300)], stated=stated)
    row, _ = tokenize(tokenizer_module, record, noise, 1, "stretch")
    marks = row["input_ids"].count(tokenizer_module["tokenizer"].convert_tokens_to_ids("<|image_pad|>"))
    assert marks > 3


@pytest.mark.usefixtures("no_pixels")
def test_guard_against_decoding_is_at_work(tokenizer_module: dict[str, Any], noise: Path) -> None:
    image = Image.open(noise / "64x128.png")
    with pytest.raises(AssertionError, match="pixels were decoded"):
        tokenize_stock(tokenizer_module, make_record([(64, 128)] * 2), [image] * 2)


def test_file_need_not_exist_when_the_record_states_the_size(
    tokenizer_module: dict[str, Any], noise: Path, tmp_path: Path
) -> None:
    record = make_record([(64, 128), (300, 246)])
    there, _ = tokenize(tokenizer_module, record, noise, 2, "keep")
    gone, _ = tokenize(tokenizer_module, record, tmp_path / "nowhere", 2, "keep")
    assert gone["input_ids"] == there["input_ids"]


def test_header_and_record_give_the_same_tokens(tokenizer_module: dict[str, Any], noise: Path) -> None:
    rows = [tokenize(tokenizer_module, make_record(SIZES[-3:], s), noise, 1, "keep")[0] for s in (True, False)]
    assert rows[0]["input_ids"] == rows[1]["input_ids"]


def test_missing_file_of_unknown_size_is_named_with_its_record(
    tokenizer_module: dict[str, Any], tmp_path: Path
) -> None:
    record = make_record([(64, 128), (300, 246)], stated=False)
    with pytest.raises(DataError, match=r"64x128\.png \(record record-1\) does not exist"):
        tokenize(tokenizer_module, record, tmp_path, 3, "stretch")


def spoil(folder: Path, kind: str) -> Path:
    path = folder / "64x128.jpg"
    make_noise(64, 128).save(path, quality=90)
    data = path.read_bytes()
    if kind == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "truncated": data[: len(data) // 2], "text": b"no image" * 50}[kind])
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "does not exist"),
        ("empty", "cannot be opened"),
        ("text", "cannot be opened"),
        ("truncated", "is damaged: .*truncated"),
    ],
)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_unreadable_image_is_named_with_its_record(
    tokenizer_module: dict[str, Any], tmp_path: Path, stage: int, kind: str, message: str
) -> None:
    """In Stage 3 nothing resizes the image, so that only an explicit load finds the damage here."""
    path = spoil(tmp_path, kind)
    template, _ = make_template(tokenizer_module["tokenizer"], "chatreid", stage)
    image = {"path": str(path), "width": 64, "height": 128, "record": "stage3-7"}
    with pytest.raises(DataError, match=rf"{path} \(record stage3-7\) {message}"):
        get_pixels(tokenizer_module, {"images": [image], "input_ids": []}, template)


def test_replaced_image_is_refused_rather_than_trained_with_a_wrong_token_count(
    tokenizer_module: dict[str, Any], noise: Path
) -> None:
    template, _ = make_template(tokenizer_module["tokenizer"], "chatreid", 3)
    image = {"path": str(noise / "64x128.png"), "width": 65, "height": 128, "record": "r"}
    with pytest.raises(DataError, match=r"is 64x128 pixels, but the record says 65x128"):
        get_pixels(tokenizer_module, {"images": [image], "input_ids": []}, template)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "I"])
@pytest.mark.parametrize("stage", [1, 3])
def test_every_mode_keeps_its_brightness(tokenizer_module: dict[str, Any], mode: str, stage: int) -> None:
    """A ramp from dark to bright must stay one: Pillow alone turns 16-bit ramps white."""
    ramp = np.linspace(0, 255, 128)[:, None] * np.ones((1, 64))
    if mode in ("I;16", "I"):
        image = Image.fromarray((ramp * 257).astype(np.uint16 if mode == "I;16" else np.int32))
    else:
        image = Image.fromarray(ramp.astype(np.uint8)).convert("RGB").convert(mode)
    assert image.mode == mode
    template, _ = make_template(tokenizer_module["tokenizer"], "chatreid", stage)
    (result,) = template.mm_plugin._regularize_images([image], image_max_pixels=10**6, image_min_pixels=1)["images"]
    assert result.mode == "RGB"
    assert result.size == ((128, 256) if stage == 1 else (64, 128))
    values = np.asarray(result).mean(axis=(1, 2))
    quarter = len(values) // 4
    assert values[:quarter].mean() < 60 and values[-quarter:].mean() > 195
    assert abs(values.mean() - 127) < 20


@pytest.fixture(scope="module")
def turned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sizes of picture for each EXIF orientation; ``<width>x<height>`` as stored."""
    folder = tmp_path_factory.mktemp("turned")
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        for size in ((90, 201), (210, 330)):
            make_noise(*size).save(folder / f"{orientation}_{size[0]}x{size[1]}.png", exif=exif)
    return folder


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("stage", "aspect"), CASES)
def test_tokens_grid_and_manifest_agree_for_every_exif_orientation(
    tokenizer_module: dict[str, Any], turned: Path, orientation: int, stage: int, aspect: Aspect
) -> None:
    """Counted from the data engine's sizes, from the header, from training's pixels and from evaluation's."""
    from chatreid_plugin.engine.image_facts import inspect_image
    from chatreid_plugin.pixels import open_crop, prepare_crop

    names = [f"{orientation}_{size}.png" for size in ("90x201", "210x330")]
    facts = [inspect_image(turned / name) for name in names]
    assert (facts[0].width, facts[0].height) == ((201, 90) if orientation > 4 else (90, 201))
    stated = tuple(ImageReference(name, f.width, f.height) for name, f in zip(names, facts, strict=True))
    record = make_record([(1, 1), (1, 1)])
    records = [replace(record, images=stated), replace(record, images=tuple(map(ImageReference, names)))]
    rows = [tokenize(tokenizer_module, r, turned, stage, aspect) for r in records]
    assert rows[0][0]["input_ids"] == rows[1][0]["input_ids"]
    crops = [prepare_crop(open_crop(turned / name), ImagePolicy(stage, aspect)) for name in names]
    evaluated = tokenizer_module["processor"].image_processor(images=crops, return_tensors="pt")
    mark = tokenizer_module["tokenizer"].convert_tokens_to_ids("<|image_pad|>")
    for row, template in rows:
        trained = get_pixels(tokenizer_module, row, template)
        assert row["input_ids"].count(mark) == int(trained["image_grid_thw"].prod(1).sum()) // 4
        assert torch.equal(trained["image_grid_thw"], evaluated["image_grid_thw"])
        assert torch.equal(trained["pixel_values"], evaluated["pixel_values"])


def test_geometry_is_the_processors_own(tokenizer_module: dict[str, Any]) -> None:
    from chatreid_plugin.images import read_geometry

    geometry = read_geometry(tokenizer_module["processor"].image_processor)
    assert (geometry.patch_size, geometry.merge_size) == (14, 2)
    assert 0 < geometry.min_pixels < geometry.max_pixels


def test_batch_without_images_gets_llamafactorys_placeholder(tokenizer_module: dict[str, Any]) -> None:
    """LLaMA-Factory adds a white 64 x 64 PIL image to text-only batches, with the stage's policy like any other."""
    template, _ = make_template(tokenizer_module["tokenizer"], "chatreid", 1)
    white = Image.new("RGB", (64, 64))
    plugin, processor = template.mm_plugin, tokenizer_module["processor"]
    (message,) = plugin.process_messages([{"role": "user", "content": "<image>"}], [white], [], [], processor)
    tokens = message["content"].count(plugin.image_token)
    grid = plugin.get_mm_inputs([white], [], [], [1], [0], [0], [[]], processor)["image_grid_thw"]
    assert tokens == int(grid.prod()) // 4
    assert plugin._get_mm_token_metadata([], [], [], processor) == {}
