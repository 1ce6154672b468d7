"""Positions of image tokens: training's collator, the HF engine of ``chat`` and ``api``, and the evaluator agree."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from chatreid_plugin.demo.people import sample_people
from chatreid_plugin.demo.tiny_model import TinySizes, write_tiny_model
from chatreid_plugin.eval.prompts import IMAGE_PAIR
from chatreid_plugin.eval.queries import make_image_query
from chatreid_plugin.eval_settings import EvalSettings
from chatreid_plugin.records import Answer, ImageRecord, ImageReference, Instruction
from chatreid_plugin.tasks import render_prompt


TOKEN_TYPES = "mm_token_type_ids"
PLUGIN = "chatreid_plugin.training.mm_plugin"
PAIR, GALLERY = "image_to_image_one_to_one", "standard_reid"
TASKS = {PAIR: Answer(match=True), GALLERY: Answer(indices=(0,))}
SIZES = {
    "pair": [(64, 128), (90, 200)],
    "square": [(128, 128), (33, 190)],
    "gallery": [(64, 128), (150, 300), (56, 56), (200, 90)],
}
STEPS = 4


@dataclass
class Trace:
    """What a model computed: position ids (3, B, L) and last logits (B, V) of each forward pass, and the first ids."""

    positions: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    input_ids: list[torch.Tensor] = field(default_factory=list)

    @property
    def all_positions(self) -> torch.Tensor:
        return torch.cat(self.positions, dim=-1)

    @property
    def tokens(self) -> list[int]:
        return [int(step[0].argmax()) for step in self.logits]


@contextmanager
def trace(model: Any) -> Generator[Trace]:
    """Record what the language model is given and what the whole model returns."""
    found = Trace()

    def see_positions(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        # generate puts a row of text positions before the three that rotate queries and keys.
        found.positions.append(named["position_ids"][-3:].clone())

    def see_logits(module: Any, arguments: Any, named: dict[str, Any], output: Any) -> None:
        found.input_ids.append(named["input_ids"])
        found.logits.append(output.logits[:, -1].float())

    handles = [
        model.model.language_model.register_forward_pre_hook(see_positions, with_kwargs=True),
        model.register_forward_hook(see_logits, with_kwargs=True),
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Checkpoint:
    """A tiny model of a family, its template, and the stock template with the same chat format."""

    folder: Path
    template: str
    stock: str


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def checkpoint(request: pytest.FixtureRequest, workshop: Any, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    if request.param == "qwen2_vl":
        return Checkpoint(workshop.model, "chatreid", "qwen2_vl")
    folder = tmp_path_factory.mktemp(request.param)
    small: dict[str, int] = {"hidden": 32, "heads": 2, "vision_hidden": 32, "patch_size": 14, "vocabulary": 600}
    write_tiny_model(folder, sample_people(20, 7), sizes=TinySizes(**small), seed=1, family=request.param)
    stock = "qwen3_vl_nothink" if request.param == "qwen3_vl" else "qwen2_vl"
    return Checkpoint(folder, f"chatreid_{request.param}", stock)


@pytest.fixture(scope="module")
def tokenizer_module(checkpoint: Checkpoint) -> dict[str, Any]:
    from llamafactory.hparams import ModelArguments
    from llamafactory.model import load_tokenizer

    return load_tokenizer(ModelArguments(model_name_or_path=str(checkpoint.folder)))


@dataclass(frozen=True)
class Service:
    """The chat model as ``llamafactory-cli chat`` and ``api`` make it, and a folder of images."""

    chat: Any
    images: Path
    checkpoint: Checkpoint

    @property
    def model(self) -> Any:
        return self.chat.engine.model

    @property
    def template(self) -> Any:
        return self.chat.engine.template

    def ask(self, record: Instruction, **changes: Any) -> Trace:
        """Return the trace of a greedy answer to a record."""
        paths = [str(self.images / image.path) for image in record.images]
        with trace(self.model) as found:
            self.chat.chat([{"role": "user", "content": render_prompt(record)}], images=paths, **changes)
        return found


@pytest.fixture(scope="module")
def service(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Service:
    from llamafactory.chat import ChatModel

    folder = tmp_path_factory.mktemp("crops")
    rng = np.random.default_rng(5)
    for width, height in {size for sizes in SIZES.values() for size in sizes}:
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{width}x{height}.png")
    arguments: dict[str, Any] = {"model_name_or_path": str(checkpoint.folder), "template": checkpoint.template}
    arguments["chatreid_stage"] = 3
    chat = ChatModel(arguments | {"infer_dtype": "float32", "do_sample": False, "max_new_tokens": STEPS})
    return Service(chat, folder, checkpoint)


def make_record(name: str) -> Instruction:
    task = GALLERY if len(SIZES[name]) > 2 else PAIR
    images = tuple(ImageReference(f"{w}x{h}.png", w, h) for w, h in SIZES[name])
    return Instruction(name, task, images, 1 if task == GALLERY else 2, TASKS[task])


def make_features(service: Service, module: dict[str, Any], records: Sequence[Instruction]) -> list[dict[str, Any]]:
    """Return the records tokenized as training tokenizes them."""
    from llamafactory.data.loader import _get_dataset_processor
    from llamafactory.hparams.parser import DataArguments

    from chatreid_plugin.training.converter import convert_record

    data_args = DataArguments(template=service.checkpoint.template)
    data_args.packing = False  # pyright: ignore[reportAttributeAccessIssue]
    processor = _get_dataset_processor(data_args, "sft", service.template, module["tokenizer"], module["processor"])
    rows = [convert_record(record, str(service.images)) for record in records]
    batch = processor.preprocess_dataset({name: [row[name] for row in rows] for name in rows[0]})
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def count_prompt(feature: dict[str, Any]) -> int:
    return next(i for i, label in enumerate(feature["labels"]) if label != -100)


def answer(feature: dict[str, Any], tokens: list[int]) -> dict[str, Any]:
    """Return the feature with other answer tokens."""
    prompt = feature["input_ids"][: count_prompt(feature)]
    labels = [-100] * len(prompt) + tokens
    return feature | {
        "input_ids": prompt + tokens,
        "labels": labels,
        "attention_mask": [1] * len(labels),
    }


def make_collator(service: Service, module: dict[str, Any], **changes: Any) -> Any:
    from llamafactory.data import SFTDataCollatorWith4DAttentionMask

    values = {"model": service.model, "pad_to_multiple_of": 8, "attn_implementation": "sdpa"}
    return SFTDataCollatorWith4DAttentionMask(template=service.template, **(values | changes), **module)


def copy_features(features: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [dict(feature) for feature in features]  # the collator takes the images out


@pytest.fixture
def features(service: Service, tokenizer_module: dict[str, Any]) -> list[dict[str, Any]]:
    return make_features(service, tokenizer_module, [make_record(name) for name in SIZES])


@torch.inference_mode()
def test_chat_generates_with_the_positions_and_logits_of_training(
    service: Service, tokenizer_module: dict[str, Any], features: list[dict[str, Any]]
) -> None:
    """The engine's own tokens, put into training's batch as the answers: every step must be what training sees."""
    traces = [service.ask(make_record(name)) for name in SIZES]
    answered = [answer(f, trace.tokens) for f, trace in zip(features, traces, strict=True)]
    batch = make_collator(service, tokenizer_module)(copy_features(answered))
    logits = service.model(**batch).logits
    for number, (feature, found) in enumerate(zip(answered, traces, strict=True)):
        prompt, steps = count_prompt(feature), len(found.tokens)
        assert found.input_ids[0][0].tolist() == feature["input_ids"][:prompt]
        expected = batch["position_ids"][1:, number, : prompt + steps - 1]
        assert steps > 1 and torch.equal(found.all_positions[:, 0], expected)
        assert len(expected.unique(dim=0)) == 3  # time, height and width differ: images lie in a plane
        got = logits[number, prompt - 1 : prompt + steps - 1]
        torch.testing.assert_close(torch.cat(found.logits), got, atol=1e-4, rtol=0)


def test_several_answers_to_one_question_share_the_positions(service: Service) -> None:
    record = make_record("gallery")
    several = service.ask(record, num_return_sequences=2)
    one = service.ask(record)
    assert torch.equal(several.positions[0], one.positions[0].expand(-1, 2, -1))


@torch.inference_mode()
@pytest.mark.parametrize("name", ["pair", "square"])
def test_evaluator_scores_with_the_positions_and_logits_of_chat(name: str, service: Service, tmp_path: Path) -> None:
    from chatreid_plugin.eval.backends.transformers import TransformersScorer

    settings = EvalSettings.model_validate(
        {"protocol": "folder", "manifest": "m.parquet", "device": "cpu"}
        | {"model_name_or_path": str(service.checkpoint.folder)}
        | {"output_dir": tmp_path, "chatreid_stage": 3, "dtype": "float32"}
    )
    scorer = TransformersScorer(settings, service.images)
    record = make_record(name)
    query, candidate = (
        ImageRecord(image.path, "t", "gallery", image.path, "t:1", "1", image.width, image.height)
        for image in record.images
    )
    with trace(scorer.model) as scored:
        (margin,) = scorer.score_pairs(make_image_query(query), [candidate], IMAGE_PAIR)
    asked = service.ask(record)
    assert torch.equal(scored.all_positions, asked.positions[0])
    yes, no = (scorer.processor.tokenizer.convert_tokens_to_ids(word) for word in ("Yes", "No"))
    assert margin == pytest.approx(float(asked.logits[0][0, yes] - asked.logits[0][0, no]), abs=1e-4)


def test_stock_template_still_generates_with_positions_of_words(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 1. When this fails, LLaMA-Factory passes the token types itself and positions.py can go."""
    from llamafactory.data.template import TEMPLATES

    record = make_record("pair")
    ours = service.ask(record)
    monkeypatch.setattr(service.chat.engine, "template", TEMPLATES[service.checkpoint.stock])
    stock = service.ask(record)
    assert stock.input_ids[0].tolist() == ours.input_ids[0].tolist()
    message = "LLaMA-Factory's HF engine places image tokens rightly now: remove positions.py and get_mm_inputs."
    words = torch.arange(stock.positions[0].shape[-1]).expand(3, 1, -1)
    assert torch.equal(stock.positions[0], words), message
    assert int(ours.positions[0].max()) < int(words.max())
    assert not torch.allclose(stock.logits[0], ours.logits[0], atol=1e-3)


def collate_as_before(collator: Any, features: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the batch of LLaMA-Factory's own collator and image inputs."""
    with monkeypatch.context() as patch:
        patch.setattr(f"{PLUGIN}.takes_token_types", lambda: False)
        return type(collator).__call__(collator, features)


@pytest.mark.parametrize("names", [["pair", "square", "gallery"], ["gallery"], []], ids=["mixed", "one", "text"])
def test_training_batch_and_loss_are_bit_for_bit_as_without_token_types(
    names: list[str],
    service: Service,
    tokenizer_module: dict[str, Any],
    features: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = [f for f, name in zip(features, SIZES, strict=True) if name in names]
    if not names:  # text alone: LLaMA-Factory adds a white image that no token attends to
        chosen = [{"input_ids": [5, 6, 7], "attention_mask": [1] * 3, "labels": [-100, 6, 7], "images": None}]
    collator = make_collator(service, tokenizer_module)
    before = collate_as_before(collator, copy_features(chosen), monkeypatch)
    after = collator(copy_features(chosen))
    assert list(after) == list(before) and TOKEN_TYPES not in after
    assert after["input_ids"].shape[1] % 8 == 0
    for key, value in before.items():
        assert torch.equal(after[key], value), key
    with torch.inference_mode():
        assert float(service.model(**after).loss) == float(service.model(**before).loss)


@torch.inference_mode()
@pytest.mark.parametrize(("side", "multiple"), [("left", None), ("right", 8)], ids=["predict", "evaluate"])
def test_collator_without_a_model_keeps_what_generation_needs(
    side: str,
    multiple: int | None,
    service: Service,
    tokenizer_module: dict[str, Any],
    features: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With ``predict_with_generate`` LLaMA-Factory's collator knows no model: it cannot make positions."""
    prompts = [f | {"input_ids": f["input_ids"][: count_prompt(f)]} for f in features]
    prompts = [f | {key: [1] * len(f["input_ids"]) for key in ("attention_mask", "labels")} for f in prompts]
    expected = make_collator(service, tokenizer_module)(copy_features(prompts))["position_ids"][1:]
    monkeypatch.setattr(tokenizer_module["tokenizer"], "padding_side", side)
    collator = make_collator(service, tokenizer_module, model=None, pad_to_multiple_of=multiple)
    batch = collator(copy_features(prompts))
    assert "position_ids" not in batch and batch[TOKEN_TYPES].shape == batch["input_ids"].shape
    batch.pop("labels")
    with trace(service.model) as found:
        service.model.generate(**batch, max_new_tokens=1, do_sample=False) if side == "left" else service.model(
            **batch
        )
    for number, prompt in enumerate(prompts):
        seen = found.positions[0][:, number][:, batch["attention_mask"][number].bool()]
        assert torch.equal(seen, expected[:, number, : len(prompt["input_ids"])])


def test_chat_without_images_gets_no_token_types(service: Service) -> None:
    found = service.template.mm_plugin.get_mm_inputs(
        [], [], [], [0], [0], [0], [[5, 6]], service.chat.engine.processor
    )
    assert TOKEN_TYPES not in found


def test_older_transformers_get_no_token_types(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize(("side", "expected"), [("left", [0, 0, 1, 1]), ("right", [1, 1, 0, 0])])
def test_token_types_are_padded_on_the_tokenizers_side(side: str, expected: list[int]) -> None:
    from chatreid_plugin.training.positions import fit_token_types

    batch = {"input_ids": torch.zeros(1, 4), TOKEN_TYPES: torch.ones(1, 2, dtype=torch.long)}
    fit_token_types(batch, side)
    assert batch[TOKEN_TYPES].tolist() == [expected]


def test_other_templates_are_left_alone(
    service: Service, tokenizer_module: dict[str, Any], features: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamafactory.data.template import TEMPLATES

    stock = TEMPLATES[service.checkpoint.stock]
    get_inputs: Callable[..., dict[str, Any]] = stock.mm_plugin.get_mm_inputs

    def add_types(*arguments: Any) -> dict[str, Any]:
        return get_inputs(*arguments) | {TOKEN_TYPES: [[0] * 3]}

    monkeypatch.setattr(stock.mm_plugin, "get_mm_inputs", add_types)
    collator = make_collator(service, tokenizer_module)
    collator.template = stock
    feature = features[0] | {"images": [str(service.images / f"{w}x{h}.png") for w, h in SIZES["pair"]]}
    assert collator([feature])[TOKEN_TYPES].shape == (1, 3)
