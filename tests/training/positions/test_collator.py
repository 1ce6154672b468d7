"""Positions of image tokens in training's collator: those of ``chat``, and what ``predict_with_generate`` needs."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from chatreid_plugin.records import Instruction


TOKEN_TYPES = "mm_token_type_ids"
PLUGIN = "chatreid_plugin.training.template"


@pytest.fixture(scope="module")
def tokenizer_module(checkpoint: Any) -> dict[str, Any]:
    from llamafactory.hparams import ModelArguments
    from llamafactory.model import load_tokenizer

    return load_tokenizer(ModelArguments(model_name_or_path=str(checkpoint.folder)))


def make_features(service: Any, module: dict[str, Any], records: Sequence[Instruction]) -> list[dict[str, Any]]:
    """Return the records tokenized as training tokenizes them."""
    from llamafactory.data.loader import _get_dataset_processor
    from llamafactory.hparams.parser import DataArguments

    from chatreid_plugin.training.loader import convert_record

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


def make_collator(service: Any, module: dict[str, Any], **changes: Any) -> Any:
    from llamafactory.data import SFTDataCollatorWith4DAttentionMask

    values = {"model": service.model, "pad_to_multiple_of": 8, "attn_implementation": "sdpa"}
    return SFTDataCollatorWith4DAttentionMask(template=service.template, **(values | changes), **module)


def copy_features(features: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [dict(feature) for feature in features]  # the collator takes the images out


@pytest.fixture
def features(service: Any, tokenizer_module: dict[str, Any]) -> list[dict[str, Any]]:
    return make_features(service, tokenizer_module, [service.make_record(name) for name in service.sizes])


@torch.inference_mode()
def test_chat_generates_with_the_positions_and_logits_of_training(
    service: Any, tokenizer_module: dict[str, Any], features: list[dict[str, Any]]
) -> None:
    """The engine's own tokens, put into training's batch as the answers: every step must be what training sees."""
    traces = [service.ask(service.make_record(name)) for name in service.sizes]
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


def collate_as_before(collator: Any, features: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the batch of LLaMA-Factory's own collator and image inputs."""
    with monkeypatch.context() as patch:
        patch.setattr(f"{PLUGIN}.takes_token_types", lambda: False)
        return type(collator).__call__(collator, features)


@pytest.mark.parametrize("names", [["pair", "square", "gallery"], ["gallery"], []], ids=["mixed", "one", "text"])
def test_training_batch_and_loss_are_bit_for_bit_as_without_token_types(
    names: list[str],
    service: Any,
    tokenizer_module: dict[str, Any],
    features: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = [f for f, name in zip(features, service.sizes, strict=True) if name in names]
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
    service: Any,
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
    with service.trace(service.model) as found:
        service.model.generate(**batch, max_new_tokens=1, do_sample=False) if side == "left" else service.model(
            **batch
        )
    for number, prompt in enumerate(prompts):
        seen = found.positions[0][:, number][:, batch["attention_mask"][number].bool()]
        assert torch.equal(seen, expected[:, number, : len(prompt["input_ids"])])


@pytest.mark.parametrize(("side", "expected"), [("left", [0, 0, 1, 1]), ("right", [1, 1, 0, 0])])
def test_token_types_are_padded_on_the_tokenizers_side(side: str, expected: list[int]) -> None:
    from chatreid_plugin.training.loader import fit_token_types

    batch = {"input_ids": torch.zeros(1, 4), TOKEN_TYPES: torch.ones(1, 2, dtype=torch.long)}
    fit_token_types(batch, side)
    assert batch[TOKEN_TYPES].tolist() == [expected]


def test_other_templates_are_left_alone(
    service: Any, tokenizer_module: dict[str, Any], features: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamafactory.data.template import TEMPLATES

    stock = TEMPLATES[service.checkpoint.stock]
    get_inputs: Callable[..., dict[str, Any]] = stock.mm_plugin.get_mm_inputs

    def add_types(*arguments: Any) -> dict[str, Any]:
        return get_inputs(*arguments) | {TOKEN_TYPES: [[0] * 3]}

    monkeypatch.setattr(stock.mm_plugin, "get_mm_inputs", add_types)
    collator = make_collator(service, tokenizer_module)
    collator.template = stock
    feature = features[0] | {"images": [str(service.images / f"{w}x{h}.png") for w, h in service.sizes["pair"]]}
    assert collator([feature])[TOKEN_TYPES].shape == (1, 3)
