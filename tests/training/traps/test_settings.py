"""Traps of settings: combinations that LLaMA-Factory accepts and that crash, stall or change nothing."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from chatreid_plugin.config import BuildSettings
from chatreid_plugin.errors import ConfigError
from chatreid_plugin.shards import read_json
from chatreid_plugin.training.batches import measure_records
from chatreid_plugin.training.loader import LazyTokenizer
from chatreid_plugin.training.recipe_checks import check_eager, check_lazy
from chatreid_plugin.training.trainer import set_vision_rate


ROOT = Path(__file__).parents[3]
STOCK = {"template": "qwen2_vl", "chatreid_stage": None, "chatreid_lazy": False}
STREAMING: dict[str, Any] = {
    "streaming": True,
    "chatreid_lazy": False,
    "dataloader_num_workers": 1,
    "accelerator_config": {"dispatch_batches": False},
}
Parse = Callable[..., Any]


def test_trap_03_streaming_with_dispatched_batches_is_refused(parse: Parse) -> None:
    parse(1, **STREAMING)
    for value in ({"dispatch_batches": True}, {"split_batches": False}, None):
        with pytest.raises(ConfigError, match=r"Set accelerator_config: \{dispatch_batches: false\}"):
            parse(1, **STREAMING | {"accelerator_config": value})
    parse(1, **STREAMING | STOCK | {"accelerator_config": None, "dataset": "any"})  # not ours to refuse


def test_trap_04_streaming_without_a_worker_is_refused(parse: Parse) -> None:
    with pytest.raises(ConfigError, match="Set dataloader_num_workers: 1 or more"):
        parse(1, **STREAMING | {"dataloader_num_workers": 0})


def test_trap_05_recipes_read_records_by_number_and_do_not_stream(load_rows: Callable[..., Any]) -> None:
    """So every process reads its own part, and a resumed run tokenizes nothing to get where it was."""
    for path in (ROOT / "examples").rglob("*.yaml"):
        values = yaml.safe_load(path.read_text())
        if values.get("chatreid_stage") and values.get("do_train"):
            assert not values.get("streaming"), path
    rows = load_rows(1)
    read: list[int] = []
    convert = rows.format["format_kwargs"]["transform"].convert

    def count(columns: dict[str, list[Any]]) -> Any:
        read.append(len(columns["id"]))
        return convert(columns)

    rows.format["format_kwargs"]["transform"].convert = count
    skipped = torch.utils.data.DataLoader(rows, batch_size=None, sampler=range(len(rows) - 1, len(rows)))
    assert len(list(skipped)) == 1 and read == [1]


def test_trap_13_neat_packing_of_another_length_is_refused(parse: Parse) -> None:
    packing = {"neat_packing": True, "chatreid_lazy": False}
    parse(1, cutoff_len=1024, **packing)
    with pytest.raises(
        ConfigError, match="cutoff_len 1001, no multiple of 8: shapes do not match. Set cutoff_len: 1008"
    ):
        parse(1, cutoff_len=1001, **packing)
    parse(1, cutoff_len=1001, packing=True, chatreid_lazy=False)  # positions are counted after padding


def test_trap_13_packed_records_have_the_logits_of_single_ones(
    data: Any, model: Any, collate: Callable[..., Any]
) -> None:
    records = [data.make("r1"), data.make("r2", 3), data.make("r3", 2)]
    singles = data.load(records)
    packed = data.load(records, neat_packing=True, cutoff_len=512, chatreid_lazy=False)
    assert len(packed) == 1 and len(packed[0]["images"]) == 9
    batch = collate(packed[0], block_diag_attn=True, neat_packing=True)
    with torch.no_grad():
        logits = model(**batch).logits[0]
        for length, row in {len(row["input_ids"]): row for row in singles}.items():
            (start,) = (
                begin
                for begin, end in zip(
                    packed[0]["packing_params"]["sequence_boundaries"],
                    packed[0]["packing_params"]["sequence_boundaries"][1:],
                    strict=False,
                )
                if packed[0]["input_ids"][begin:end] == row["input_ids"]
            )
            alone = model(**collate(row)).logits[0, :length]
            torch.testing.assert_close(logits[start : start + length], alone, rtol=1e-4, atol=1e-4)


def test_trap_25_packing_sets_without_images_is_refused(
    data: Any, parse: Parse, collate: Callable[..., Any], tokenizer_module: dict[str, Any]
) -> None:
    """LLaMA-Factory adds an image to a pack without one, and its tokens to the mask alone."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer

    keys = data.enter([data.make("r1")]) | {"neat_packing": True, "cutoff_len": 128, "chatreid_lazy": False}
    info = data.folders / "dataset_info.json"
    (data.folders / "words.json").write_text('[{"instruction": "Say so.", "input": "", "output": "So."}]')
    info.write_text(json.dumps(read_json(info) | {"words": {"file_name": "words.json"}}))
    with pytest.raises(ConfigError, match="neat_packing with words, which has no images.*leave words out"):
        parse(3, **keys | {"dataset": "made,words"})
    parsed = parse(3, **keys)
    parsed.data.dataset = ["words"]
    template = get_template_and_fix_tokenizer(tokenizer_module["tokenizer"], parsed.data)
    module = get_dataset(template, parsed.model, parsed.data, parsed.training, stage="sft", **tokenizer_module)
    batch = collate(module["train_dataset"][0], block_diag_attn=True, neat_packing=True)
    assert batch["attention_mask"].shape[-1] != batch["input_ids"].shape[-1]  # as stock; the model stops


def test_trap_14_interleave_once_is_refused_before_anything_is_read(parse: Parse) -> None:
    with pytest.raises(ConfigError, match="interleave_once raises ValueError. Use concat or interleave_under"):
        parse(1, mix_strategy="interleave_once", dataset_dir="no/such/folder")
    parse(1, mix_strategy="interleave_under")


def test_every_fault_of_the_settings_is_named_at_once(parse: Parse) -> None:
    with pytest.raises(ConfigError, match="interleave_once.*dispatch_batches.*dataloader_num_workers"):
        parse(1, streaming=True, chatreid_lazy=False, mix_strategy="interleave_once")


@pytest.mark.parametrize("stage", ["pt", "kto"])
def test_trap_23_records_in_another_stage_are_refused(parse: Parse, stage: str) -> None:
    """Pre-training would learn a literal `<image>`; KTO ends in a TypeError of its collator."""
    with pytest.raises(ConfigError, match=f"stage: {stage} cannot train on ChatReID records.*Set stage: sft"):
        parse(1, stage=stage)
    parse(1, stage=stage, dataset="any", dataset_dir="ONLINE", chatreid_lazy=False)  # not ours to refuse


def test_trap_24_records_with_a_stock_template_are_refused(parse: Parse) -> None:
    """Its plugin reads images of other forms: KeyError 'bytes' as the records are tokenized."""
    with pytest.raises(ConfigError, match="template: qwen2_vl cannot read ChatReID.*Set template: chatreid"):
        parse(1, **STOCK)
    with pytest.raises(ConfigError, match="template: qwen2_vl cannot read ChatReID.*Set template: chatreid"):
        parse(1, **STOCK | {"dataset": "any", "eval_dataset": "chatreid_stage1_image_captioning"})


def test_trap_26_packs_without_boundaries_and_people_on_both_sides_are_a_warning(
    parse: Parse, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        parse(1)
        parse(1, val_size=0.1, dataset="any", dataset_dir="ONLINE")
        assert "chatreid:" not in caplog.text
        parse(1, val_size=0.1, packing=True, chatreid_lazy=False)
    assert "val_size holds out records, not people" in caplog.text
    assert "the records of a pack attend to each other" in caplog.text


def test_trap_27_metrics_of_each_data_set_are_refused_where_one_is_wanted(parse: Parse) -> None:
    """Doctor's tests have the keys that are refused one by one."""
    name = "chatreid_stage1_image_captioning"
    each = {
        "eval_dataset": name,
        "eval_on_each_dataset": True,
        "eval_strategy": "steps",
        "load_best_model_at_end": True,
    }
    with pytest.raises(ConfigError, match=f"Set metric_for_best_model: eval_{name}_loss"):
        parse(1, **each)
    parse(1, metric_for_best_model=f"eval_{name}_loss", **each)


def test_trap_19_tokenization_touches_no_image_and_too_many_processes_are_a_warning(
    data: Any, read_recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("an image was decoded"))
    assert len(data.load([data.make("r1")], chatreid_lazy=False, preprocessing_num_workers=1)) == 1
    (finding,) = check_eager(
        read_recipe(1, chatreid_lazy=False, preprocessing_num_workers=4096, ddp_timeout=180000000)
    )
    assert (finding.state, "may run out of memory" in finding.found) == ("warning", True)


def test_trap_20_records_are_built_as_parquet_shards_far_below_two_gigabytes(workshop: Any) -> None:
    entries = read_json(workshop.dataset_dir / "dataset_info.json")
    shards = [list((workshop.dataset_dir / entry["file_name"]).iterdir()) for entry in entries.values()]
    assert shards and {file.suffix for files in shards for file in files} == {".parquet"}
    # A record of 26 images and long captions has some 10 kB.
    assert BuildSettings.model_fields["records_per_shard"].default * 10_000 < 2**31


def test_trap_21_the_vision_encoder_can_have_its_own_learning_rate(parse: Parse, model: Any) -> None:
    assert parse(1, chatreid_vision_learning_rate="1e-6").finetuning.chatreid_vision_learning_rate == 1e-6
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    set_vision_rate(optimizer, model.named_parameters(), 1e-6, "encoder")
    rates = {id(value): group["lr"] for group in optimizer.param_groups for value in group["params"]}
    assert all(rates[id(value)] == (1e-6 if "visual." in name else 1e-3) for name, value in model.named_parameters())


def test_trap_22_lengths_come_from_the_records_and_token_counting_is_a_warning_in_lazy_mode(
    parse: Parse,
    read_recipe: Callable[..., Any],
    load_rows: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counting = {"include_effective_tokens_per_second": True}
    with caplog.at_level(logging.WARNING):
        parse(1, chatreid_lazy=False, **counting)
        parse(1)
        assert "every record" not in caplog.text
        parse(1, **counting)
    assert "include_effective_tokens_per_second reads and decodes every record" in caplog.text
    assert [finding.state for finding in check_lazy(read_recipe(1, **counting))] == ["warning"]
    assert read_recipe(1).training.train_sampling_strategy == "group_by_length"
    rows = load_rows(2)
    monkeypatch.setattr("chatreid_plugin.training.batches.SAMPLED", 1)
    asked: list[int] = []
    tokenize = LazyTokenizer.__call__
    monkeypatch.setattr(
        LazyTokenizer, "__call__", lambda self, batch: (asked.append(len(batch["id"])), tokenize(self, batch))[1]
    )
    lengths = measure_records(rows)
    assert lengths is not None and len(lengths) == len(rows) and set(asked) == {1} and len(asked) < len(rows) / 2
