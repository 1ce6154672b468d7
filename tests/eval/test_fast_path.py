"""Shared prefixes, stored features and batches give what one plain forward pass per pair gives, in every family."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from chatreid_plugin.datasets.benchmark import Query, make_image_query
from chatreid_plugin.errors import ConfigError, UpstreamError
from chatreid_plugin.eval import run as evaluation
from chatreid_plugin.eval.backends.decoder import Decoder
from chatreid_plugin.eval.backends.transformers import TransformersScorer
from chatreid_plugin.eval.candidates import make_plan
from chatreid_plugin.eval.questions import IMAGE_PAIR, TEXT_PAIR, build_choice_prompt, build_pair_prompt
from chatreid_plugin.records import ImageRecord
from chatreid_plugin.shards import write_manifest
from chatreid_plugin.tasks import LETTERS
from tests.support import make_eval_settings


FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SIZES = [(64, 128), (48, 128), (200, 400), (128, 256), (64, 128), (64, 128), (128, 256)]
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
}
VISION: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"hidden_size": 64, "fullatt_block_indexes": [1], "window_size": 64},
    "qwen3_vl": {"hidden_size": 64, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
}


def make_config(family: str, base: Any) -> Any:
    """Return a tiny configuration of another family with the tokens of a Qwen2-VL's."""
    from transformers import AutoConfig

    vision = {"depth": 2, "num_heads": 4, "out_hidden_size": 64, "intermediate_size": 96, "patch_size": 16}
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    make: Any = AutoConfig.for_model
    return make(
        family,
        text_config=TEXT | {"vocab_size": base.text_config.vocab_size},
        vision_config=vision | VISION[family],
        **{name: getattr(base, name) for name in tokens},
    )


@pytest.fixture(scope="module")
def checkpoints(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    root = tmp_path_factory.mktemp("models")
    folders = {"qwen2_vl": checkpoint} | {family: root / family for family in FAMILIES[1:]}
    processor = AutoProcessor.from_pretrained(checkpoint)
    for family in FAMILIES[1:]:
        torch.manual_seed(1)
        model: Any = AutoModelForImageTextToText.from_config(
            make_config(family, AutoConfig.from_pretrained(checkpoint))
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, parameter[0].numel() ** -0.5)
        model.save_pretrained(folders[family])
        processor.save_pretrained(folders[family])
    return folders


@pytest.fixture(scope="module")
def crops(write_noise: Callable[..., tuple[Path, list[ImageRecord]]]) -> tuple[Path, list[ImageRecord]]:
    return write_noise(SIZES)


@dataclass
class Bench:
    """A scorer's maker and the plain reference for it."""

    root: Path
    records: list[ImageRecord]
    output: Path

    def make(self, checkpoint: Path, **changes: Any) -> TransformersScorer:
        # No stage policy: the crops keep several sizes.
        values = {"protocol": "folder", "manifest": "m.parquet", "device": "cpu"}
        values |= {
            "model_name_or_path": str(checkpoint),
            "output_dir": self.output,
            "chatreid_stage": None,
            "dtype": "float32",
            "batch_size": 2,
        }
        settings = make_eval_settings(values | changes)
        return TransformersScorer(settings.model, self.root, settings.scoring.image_order)

    def compute_logits(
        self, scorer: TransformersScorer, segments: Sequence[str], images: Sequence[ImageRecord]
    ) -> torch.Tensor:
        """One forward pass of the whole model through transformers' own processor, nothing shared."""
        content = "<|vision_start|><|image_pad|><|vision_end|>".join(segments)
        system = "" if scorer.model.config.model_type == "qwen3_vl" else SYSTEM
        text = f"{system}<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
        pictures = [Image.open(self.root / record.path).convert("RGB") for record in images]
        inputs = scorer.processor(text=[text], images=pictures, return_tensors="pt")
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == scorer.model.config.image_token_id).int()
        with torch.inference_mode():
            return scorer.model(**inputs).logits[0, -1].float()

    def compute_margin(self, scorer: TransformersScorer, segments: Sequence[str], *images: ImageRecord) -> float:
        logits = self.compute_logits(scorer, segments, images)
        yes, no = (scorer.processor.tokenizer.convert_tokens_to_ids(word) for word in ("Yes", "No"))
        return float(logits[yes] - logits[no])


@pytest.fixture
def bench(crops: tuple[Path, list[ImageRecord]], tmp_path: Path) -> Bench:
    return Bench(*crops, tmp_path)


def check_equal(found: Any, expected: Sequence[float]) -> None:
    assert found.dtype == np.float32 and len(set(np.round(found, 4))) > 1
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.argsort(found).tolist() == np.argsort(expected).tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", ["query_first", "gallery_first", "both"])
def test_pairs_equal_one_forward_pass_each_when_sizes_and_orders_differ(
    family: str, order: str, bench: Bench, checkpoints: dict[str, Path]
) -> None:
    scorer = bench.make(checkpoints[family], image_order=order)
    first, *candidates = bench.records
    query = make_image_query(first)
    segments = build_pair_prompt(query, IMAGE_PAIR).segments
    forward = [bench.compute_margin(scorer, segments, first, other) for other in candidates]
    swapped = [bench.compute_margin(scorer, segments, other, first) for other in candidates]
    both = [(one + two) / 2 for one, two in zip(forward, swapped, strict=True)]
    expected = {"query_first": forward, "gallery_first": swapped, "both": both}[order]
    check_equal(scorer.score_pairs(query, candidates, IMAGE_PAIR), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_pairs_and_choices_equal_one_forward_pass_each(
    family: str, bench: Bench, checkpoints: dict[str, Path]
) -> None:
    scorer = bench.make(checkpoints[family])
    words = Query("words", "1", text="A man in a red coat.")
    segments = build_pair_prompt(words, TEXT_PAIR).segments
    expected = [bench.compute_margin(scorer, segments, other) for other in bench.records]
    check_equal(scorer.score_pairs(words, bench.records, TEXT_PAIR), expected)
    query, others = make_image_query(bench.records[2]), bench.records[3:]
    prompt = build_choice_prompt(query, "standard_reid", len(others))
    logits = bench.compute_logits(scorer, prompt.segments, bench.records[2:])
    letters = scorer.processor.tokenizer.convert_tokens_to_ids(list(LETTERS[: len(others)]))
    check_equal(scorer.choose(query, [others], "standard_reid")[0], logits[letters].tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_equal_one_forward_pass_each_when_lengths_and_sizes_differ(
    family: str, bench: Bench, checkpoints: dict[str, Path]
) -> None:
    scorer = bench.make(checkpoints[family], batch_size=6)
    records, query = bench.records, make_image_query(bench.records[2])
    windows = [[records[place] for place in places] for places in ((3, 4, 5), (3, 0), (3, 5, 4), (6, 1, 3), (3, 6))]
    for window, found in zip(windows, scorer.choose(query, windows, "standard_reid"), strict=True):
        segments = build_choice_prompt(query, "standard_reid", len(window)).segments
        logits = bench.compute_logits(scorer, segments, [records[2], *window])
        letters = scorer.processor.tokenizer.convert_tokens_to_ids(list(LETTERS[: len(window)]))
        check_equal(found, logits[letters].tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_is_merged_by_its_folder_or_by_its_key(
    family: str, bench: Bench, checkpoints: dict[str, Path]
) -> None:
    from peft import LoraConfig, get_peft_model

    base = bench.make(checkpoints[family])
    first, *candidates = bench.records
    query = make_image_query(first)
    segments = build_pair_prompt(query, IMAGE_PAIR).segments
    plain = base.score_pairs(query, candidates, IMAGE_PAIR)
    torch.manual_seed(0)
    adapted: Any = get_peft_model(base.model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.eval().save_pretrained(str(bench.output / "adapter"))
    expected = [bench.compute_margin(base, segments, first, other) for other in candidates]
    assert np.abs(plain - expected).max() > 1e-2
    by_folder = bench.make(bench.output / "adapter")
    check_equal(by_folder.score_pairs(query, candidates, IMAGE_PAIR), expected)
    by_key = bench.make(checkpoints[family], adapter_name_or_path=str(bench.output / "adapter"))
    assert by_key.fingerprint == by_folder.fingerprint != base.fingerprint
    with pytest.raises(ConfigError, match="adapter itself"):
        bench.make(bench.output / "adapter", adapter_name_or_path=str(bench.output / "adapter"))


def test_rows_are_halved_when_memory_runs_out(
    bench: Bench, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = bench.make(checkpoints["qwen2_vl"], batch_size=4)
    query, candidates = make_image_query(bench.records[0]), bench.records[1:]
    expected = bench.make(checkpoints["qwen2_vl"]).score_pairs(query, candidates, IMAGE_PAIR)
    compute, sizes = scorer._decoder.compute_last, list[int]()
    most = 1

    def run_short(tokens: Any, rows: Any, prefix: Any = None) -> torch.Tensor:
        sizes.append(len(rows))
        if len(rows) > most:
            raise torch.cuda.OutOfMemoryError("no room")
        return compute(tokens, rows, prefix)

    monkeypatch.setattr(scorer._decoder, "compute_last", run_short)
    np.testing.assert_allclose(scorer.score_pairs(query, candidates, IMAGE_PAIR), expected, atol=1e-5)
    assert max(sizes) > 1 and sizes.count(1) == len(candidates)
    most = 0
    with pytest.raises(UpstreamError, match=r"no memory for one of the questions.*no room"):
        scorer.score_pairs(query, candidates, IMAGE_PAIR)


def test_one_attention_call_a_layer_encodes_crops_of_one_size(
    bench: Bench, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = bench.make(checkpoints["qwen2_vl"])
    attend, batches = torch.nn.functional.scaled_dot_product_attention, list[int]()

    def count(query: torch.Tensor, *states: Any, **options: Any) -> torch.Tensor:
        batches.append(len(query))
        return attend(query, *states, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    equal = [record for record in bench.records if (record.width, record.height) == (64, 128)]
    scorer.features.encode(equal)
    assert batches == [len(equal)] * scorer.model.config.vision_config.depth


@pytest.fixture
def prefix_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many questions' beginnings each forward pass computes."""
    compute, rows = Decoder.compute_prefixes, list[int]()

    def count(self: Decoder, beginnings: Any, images: Any) -> Any:
        rows.append(len(beginnings))
        return compute(self, beginnings, images)

    monkeypatch.setattr(Decoder, "compute_prefixes", count)
    return rows


def test_prefix_is_computed_once_a_query(bench: Bench, checkpoints: dict[str, Path], prefix_rows: list[int]) -> None:
    scorer = bench.make(checkpoints["qwen2_vl"])
    query, candidates = make_image_query(bench.records[0]), bench.records[1:]
    scorer.score_pairs(query, candidates, IMAGE_PAIR)
    scorer.choose(query, [candidates, candidates[::-1]], "standard_reid")
    scorer.choose(query, [candidates[:2]], "standard_reid")
    assert prefix_rows == [1, 1]  # one a task


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", ["query_first", "both"])
def test_prefixes_of_a_block_are_computed_at_once_by_size(
    family: str, order: str, bench: Bench, checkpoints: dict[str, Path], prefix_rows: list[int]
) -> None:
    queries, candidates = [make_image_query(record) for record in bench.records], bench.records
    alone, scorer = (bench.make(checkpoints[family], image_order=order) for _ in range(2))
    expected = [alone.score_pairs(query, candidates, IMAGE_PAIR) for query in queries]
    prefix_rows.clear()
    scorer.prepare(queries, candidates)
    for query, own in zip(queries, expected, strict=True):
        np.testing.assert_allclose(scorer.score_pairs(query, candidates, IMAGE_PAIR), own, atol=1e-5)
    sizes = Counter(scorer.features[record.image_id].grid for record in bench.records).values()
    # With the candidate first, all questions begin alike.
    assert sorted(prefix_rows) == sorted([*sizes, *([1] if order == "both" else [])])


def test_scores_have_the_same_bits_when_a_block_is_resumed(bench: Bench, checkpoints: dict[str, Path]) -> None:
    queries, candidates = [make_image_query(record) for record in bench.records], bench.records
    whole, resumed = (bench.make(checkpoints["qwen2_vl"]) for _ in range(2))
    for scorer in (whole, resumed):
        scorer.prepare(queries, candidates)
    expected = [whole.score_pairs(query, candidates, IMAGE_PAIR) for query in queries]
    assert np.array_equal(resumed.score_pairs(queries[5], candidates, IMAGE_PAIR), expected[5])


def test_bf16_scores_have_the_same_bits_when_resumed_or_shared_out(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "QUERY_BLOCK", 4)
    rng, records = np.random.default_rng(5), list[ImageRecord]()
    for index in range(48):
        (width, height), split = SIZES[rng.integers(2)], "query" if index < 12 else "gallery"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"{index}.png")
        person = f"t:{index % 12}"
        records.append(ImageRecord(f"t/{index}", "t", split, f"{index}.png", person, str(index), width, height))
    write_manifest(tmp_path / "m.parquet", records, tmp_path, {})
    values = {"protocol": "folder", "manifest": tmp_path / "m.parquet", "output_dir": tmp_path, "device": "cpu"}
    values |= {"model_name_or_path": str(checkpoints["qwen2_5_vl"]), "chatreid_stage": None, "dtype": "bfloat16"}
    settings = make_eval_settings(values | {"filter": "colour", "top_k": 6, "floor": 0})
    plan = make_plan(settings)

    def score(share: Sequence[int]) -> list[Any]:
        """As a process does whose share, or what is left of it, is this."""
        scorer = TransformersScorer(settings.model, tmp_path)
        encode = scorer.model.get_image_features

        def encode_together(pixels: torch.Tensor, grids: torch.Tensor) -> Any:
            # A large processor's rounding depends on the whole batch; this shows it on any.
            return encode(pixels + 0.1 * pixels.float().mean() * len(grids), grids)

        scorer.model.get_image_features = encode_together
        return [scored.scores for _, scored in evaluation._iterate_share(settings, plan, scorer, share, show=False)]

    whole = score(range(12))
    assert np.array_equal(whole[:1] + whole[9:], score(range(1)) + score(range(9, 12)))
    assert np.array_equal(whole, score(range(6)) + score(range(6, 12)))


def test_texts_share_what_stands_before_the_candidate(
    bench: Bench, checkpoints: dict[str, Path], prefix_rows: list[int]
) -> None:
    scorer = bench.make(checkpoints["qwen2_vl"])
    queries = [Query(text, "1", text=text) for text in ("A man in red.", "A man in a long blue coat.")]
    scorer.prepare([*queries, make_image_query(bench.records[0])], bench.records)
    margins = [scorer.score_pairs(query, bench.records, TEXT_PAIR) for query in queries]
    assert np.abs(margins[0] - margins[1]).max() > 1e-3
    assert prefix_rows == [1]  # the words come after the image
