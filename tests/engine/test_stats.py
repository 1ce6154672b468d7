"""Tests of chatreid_plugin.engine.stats: hand-made records with known numbers, beside what a recipe intends."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chatreid_plugin.answers import render_turns
from chatreid_plugin.config import GallerySettings
from chatreid_plugin.engine import stats
from chatreid_plugin.engine.show import list_datasets
from chatreid_plugin.engine.stats import (
    Comparison,
    IdentityStatistics,
    compare,
    compute_gallery_shares,
    compute_match_shares,
    compute_statistics,
    count_values,
    find_smallest_matches,
    measure_records,
    summarize_tokens,
)
from chatreid_plugin.errors import DataError
from chatreid_plugin.images import ImagePolicy, count_visual_tokens
from chatreid_plugin.records import Answer, Attribute, ImageRecord, ImageReference, Instruction, Turn
from chatreid_plugin.shards import read_json, write_json, write_manifest
from chatreid_plugin.tasks import TASKS, format_chat_prompt


WriteDataset = Callable[..., Path]

SMALL, LARGE = ImageReference("a.jpg", 64, 128), ImageReference("b.jpg", 400, 900)
UNKNOWN = ImageReference("c.jpg")
ONE_IMAGE, MANY_IMAGES, STAGE3 = (
    TASKS[name] for name in ("text_to_image_one_to_many", "image_to_image_many_to_many", "standard_reid")
)


def make_record(gallery: int, right: int, **changes: Any) -> Instruction:
    values: dict[str, Any] = {
        "id": "r",
        "task": "image_to_image_many_to_many",
        "images": (SMALL,) * (gallery + 1),
        "query_images": 1,
        "answer": Answer(tuple(range(right))),
        "dataset": "own",
    }
    return Instruction(**(values | changes))


def make_pair(match: bool) -> Instruction:
    return make_record(
        1, 0, task="image_to_image_one_to_one", query_images=2, answer=Answer(match=match), dataset="other"
    )


def count(folder: Path) -> dict[str, dict[Any, int]]:
    (dataset,) = list_datasets(folder)
    records = measure_records(dataset)
    return {name: count_values(records[name]) for name in records.column_names}


def test_galleries_matches_sources_and_wordings_are_counted(
    write_dataset: WriteDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Batches smaller than a shard, so that counts are added up within and across shards.
    monkeypatch.setattr(stats, "BATCH_RECORDS", 2)
    records = [make_record(2, 2), make_record(3, 2, variant=1), make_record(3, 3, dataset="other"), make_record(5, 2)]
    counts = count(write_dataset("own_set", records, shard=3))
    assert counts["gallery"] == {2: 1, 3: 2, 5: 1}
    assert counts["matches"] == {2: 3, 3: 1}
    assert counts["variant"] == {0: 3, 1: 1}
    assert counts["source"] == {"own": 3, "other": 1}
    assert (counts["yes"], counts["unknown_sizes"]) == ({}, {0: 4})


def test_records_of_no_named_source_are_of_an_unknown_one(write_dataset: WriteDataset) -> None:
    counts = count(write_dataset("own_set", [make_record(2, 2), make_record(2, 2, dataset="")]))
    assert counts["source"] == {"own": 1, "unknown": 1}


def test_yes_and_no_are_counted(write_dataset: WriteDataset) -> None:
    counts = count(write_dataset("pairs", [make_pair(True), make_pair(False), make_pair(True)]))
    assert counts["yes"] == {0: 1, 1: 2}
    assert counts["gallery"] == {0: 3}


@pytest.mark.parametrize("task", ["image_to_image_many_to_many", "standard_reid"])
def test_visual_tokens_follow_the_policy_of_the_stage(write_dataset: WriteDataset, task: str) -> None:
    stage = 3 if task == "standard_reid" else 2
    mixed = make_record(0, 1, task=task, images=(SMALL, LARGE, LARGE, SMALL))
    counts = count(write_dataset("own_set", [make_record(2, 2, task=task), mixed]))
    small, large = (count_visual_tokens(image.width, image.height, ImagePolicy(stage)) for image in (SMALL, LARGE))
    assert counts["visual_tokens"] == {3 * small: 1, 2 * small + 2 * large: 1}


def test_images_of_unknown_size_are_counted_as_such(write_dataset: WriteDataset) -> None:
    counts = count(write_dataset("own_set", [make_record(0, 1, images=(SMALL, UNKNOWN, UNKNOWN))]))
    assert counts["unknown_sizes"] == {2: 1}
    assert counts["visual_tokens"] == {10: 1}


@pytest.mark.parametrize(
    "record",
    [
        make_record(9, 4),
        make_record(0, 0, task="image_captioning", answer=Answer(text="A woman in a red coat. " * 10)),
        make_record(0, 1, task="text_to_image_many_to_one", captions=("A man in black.", "A woman in a hat.") * 3),
        make_record(
            0,
            0,
            task="attribute_prediction",
            attributes=tuple(Attribute(0, name, "something long") for name in "abcdefghij"),
        ),
        make_record(
            9,
            4,
            task="dialogue_retrieval",
            query_images=0,
            attributes=(Attribute(-1, "upper_colour", "red"),),
            turns=(Turn((0, 4, 9), 0, "A woman in a red coat. " * 3), Turn((4,), None, "", "bag", "backpack")),
        ),
    ],
    ids=lambda record: record.task,
)
def test_text_is_estimated_near_the_rendered_length(write_dataset: WriteDataset, record: Instruction) -> None:
    counts = count(write_dataset("own_set", [record]))
    estimate = next(iter(counts["tokens"])) - next(iter(counts["visual_tokens"]))
    turns = render_turns(record)
    text = "".join(map("".join, turns)).replace("<image>", "")
    # The frame is far fewer tokens than a third of its characters, but the images' marks come on top.
    frame = len(format_chat_prompt("")) // 3 + 11 * (len(turns) - 1)
    exact = len(text) / 3 + frame + 5 * len(record.images)
    assert 0.75 * exact <= estimate <= 1.25 * exact


def test_turns_are_counted_and_shards_of_earlier_versions_have_one(write_dataset: WriteDataset) -> None:
    changes: dict[str, Any] = {"task": "dialogue_retrieval", "query_images": 0}
    asked = (Turn((0,), 0, "A man."), Turn((0,), None, "", "hat", "cap"))
    folder = write_dataset("own_set", [make_record(2, 2, turns=asked[:number], **changes) for number in (1, 2, 2)])
    assert count(folder)["turns"] == {2: 1, 3: 2}
    assert "turns: 2 in 1, 3 in 2" in compute_statistics(folder).render()
    shard = folder / "own_set" / "00000.parquet"
    pq.write_table(pq.read_table(shard).drop_columns("turns"), shard)
    assert count(folder)["turns"] == {1: 3}


def test_ids_and_image_paths_stay_unread(write_dataset: WriteDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_dataset("own_set", [make_record(2, 2)])
    read: list[str] = []
    original = pq.ParquetFile.iter_batches

    def watch(file: pq.ParquetFile, size: int, columns: list[str]) -> Any:
        read.extend(columns)
        return original(file, size, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watch)
    count(folder)
    assert "images.list.element.width" in read
    assert not {"id", "images.list.element.path"} & set(read)


def test_faulty_shards_are_errors(write_dataset: WriteDataset) -> None:
    folder = write_dataset("own_set", [make_record(2, 2), make_pair(True)])
    with pytest.raises(
        DataError, match=r"00000\.parquet mixes tasks image_to_image_many_to_many and image_to_image_o"
    ):
        count(folder)
    folder = write_dataset("own_set", [make_record(0, 1, query_images=2)])
    with pytest.raises(DataError, match="fewer images than query_images"):
        count(folder)
    path = folder / "own_set" / "00000.parquet"
    (dataset,) = list_datasets(folder)
    pq.write_table(pq.ParquetFile(path).read().drop_columns("variant"), path)
    with pytest.raises(DataError, match=r"lacks column\(s\) variant"):
        measure_records(dataset)
    path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match="is not a readable Parquet file"):
        measure_records(dataset)


def test_numbers_stand_beside_what_the_recipe_intends(write_dataset: WriteDataset) -> None:
    gallery = {"min_size": 2, "max_size": 3, "matches": "inverse"}
    ratios = {"image_to_image_many_to_many": 3, "image_to_image_one_to_one": 1, "attribute_prediction": 4}
    # N = 2 has n = 2; N = 3 has n = 2 twice as often as n = 3.
    records = [make_record(2, 2)] * 30 + [make_record(3, 2)] * 20 + [make_record(3, 3)] * 10
    write_dataset("own_set", records, gallery=gallery, stage2_ratios=ratios, cutoff_len=200)
    folder = write_dataset("pairs", [make_pair(i % 10 == 0) for i in range(40)], stage2_ratios=ratios)
    statistics = compute_statistics(folder)
    assert (statistics.records, statistics.stages) == (100, {2: 100})
    one, pairs = statistics.datasets["own_set"], statistics.datasets["pairs"]
    assert (one.records, one.share, one.intended_share) == (60, 0.6, 0.75)
    assert (pairs.share, pairs.intended_share) == (0.4, 0.25)
    assert one.gallery_sizes is not None and one.matches is not None and pairs.yes_no is not None
    assert one.gallery_sizes.counts == one.gallery_sizes.expected == {2: 30, 3: 30}
    assert one.matches.counts == {2: 50, 3: 10}
    assert one.matches.expected == pytest.approx({2: 50, 3: 10}, abs=0.01)
    assert one.matches.mean == pytest.approx(130 / 60) == pytest.approx(one.matches.expected_mean)
    assert pairs.yes_no == Comparison(counts={0: 36, 1: 4}, expected={0: 20, 1: 20})
    assert (pairs.yes_no.mean, pairs.yes_no.expected_mean) == (0.1, 0.5)
    assert (one.yes_no, pairs.gallery_sizes, pairs.matches) == (None, None, None)
    assert pairs.sources == {"other": 40}
    assert one.visual_tokens.median == 30
    assert one.visual_tokens.largest == 40
    assert (one.cutoff_len, one.above_cutoff) == (200, 0)
    assert one.tokens.largest < 200
    assert compute_statistics(folder).to_json() == statistics.to_json()
    assert json.loads(statistics.to_json())["datasets"]["own_set"]["matches"]["counts"] == {"2": 50, "3": 10}


def test_terminal_shows_shares_lengths_and_means(write_dataset: WriteDataset) -> None:
    ratios = {"image_to_image_many_to_many": 3, "image_to_image_one_to_one": 1}
    gallery = {"min_size": 2, "max_size": 3}
    write_dataset("own_set", [make_record(2, 2)] * 60, gallery=gallery, stage2_ratios=ratios)
    folder = write_dataset("pairs[bold]", [make_pair(i % 10 == 0) for i in range(40)], stage2_ratios=ratios)
    lines = [re.split(r"  +", line) for line in compute_statistics(folder).render().splitlines()]
    assert lines[0] == ["data set", "records", "share", "meant", "tokens: median", "99 %", "longest"]
    assert [line[:4] for line in lines[1:3]] == [
        ["own_set", "60", "60.0%", "75.0%"],
        ["pairs[bold]", "40", "40.0%", "25.0%"],
    ]
    assert lines[4:8] == [
        ["data set", "mean of", "built", "meant"],
        ["own_set", "gallery size N", "2.00", "2.75"],
        ["own_set", "matches n", "2.00", "2.50"],
        ["pairs[bold]", "share of yes", "0.10", "0.50"],
    ]


def test_data_sets_without_a_gallery_or_yes_have_no_means(write_dataset: WriteDataset) -> None:
    record = make_record(0, 0, task="image_captioning", answer=Answer(text="A man."))
    statistics = compute_statistics(write_dataset("own_set", [record]))
    assert statistics.datasets["own_set"].list_comparisons() == []
    assert "mean of" not in statistics.render()


def test_records_above_cutoff_len_are_counted(write_dataset: WriteDataset) -> None:
    folder = write_dataset("own_set", [make_record(2, 2), make_record(20, 2)], cutoff_len=300)
    assert compute_statistics(folder).datasets["own_set"].above_cutoff == 1


def test_token_summary_has_order_statistics_of_the_lengths() -> None:
    summary = summarize_tokens(np.repeat([70, 10, 40], [1, 50, 49]))
    assert (summary.median, summary.p99, summary.largest) == (10, 40, 70)
    assert summary.mean == pytest.approx(25.3)
    assert summary.bins == {0: 50, 32: 49, 64: 1}


def test_data_set_without_a_recipe_is_left_out_with_its_reason(write_dataset: WriteDataset) -> None:
    folder = write_dataset("foreign", [make_record(2, 2)], recipe=False)
    with pytest.raises(DataError, match=r"foreign\.json does not exist"):
        compute_statistics(folder)
    write_dataset("own_set", [make_record(2, 2)])
    statistics = compute_statistics(folder)
    assert list(statistics.datasets) == ["own_set"]
    assert "foreign.json does not exist" in statistics.left_out["foreign"]
    assert "foreign: left out" in statistics.render()


def test_half_built_data_set_is_left_out(write_dataset: WriteDataset) -> None:
    folder = write_dataset("own_set", [make_record(2, 2)])
    path = folder / "own_set.json"
    write_json(path, read_json(path) | {"complete": False})
    with pytest.raises(DataError, match=r"own_set\.json: the data set is not complete"):
        compute_statistics(folder)


def test_recipe_of_another_version_is_named(write_dataset: WriteDataset) -> None:
    folder = write_dataset("own_set", [make_record(2, 2)])
    path = folder / "own_set.json"
    settings = read_json(path)["settings"]
    write_json(path, {"settings": settings | {"no_such_key": 1}})
    with pytest.raises(
        DataError, match=r"(?s)own_set\.json holds no recipe that this version understands.*no_such_key"
    ):
        compute_statistics(folder)


def test_identities_come_from_the_manifests(write_dataset: WriteDataset, tmp_path: Path) -> None:
    folder = write_dataset("own_set", [make_record(2, 2)])
    missing = compute_statistics(folder)
    assert missing.identities == {}
    assert "run this where `chatreid build` ran" in missing.identities_left_out["own"]
    shots = [("train", "1", "a"), ("train", "1", "a"), ("train", "1", "b"), ("train", "2", "a"), ("query", "3", "c")]
    records = [
        ImageRecord(f"own/{i}", "own", split, f"{i}.jpg", f"own:{person}", camera, 8, 16)  # type: ignore[arg-type]
        for i, (split, person, camera) in enumerate(shots)
    ]
    write_manifest(tmp_path / "manifests" / "own.parquet", records, tmp_path, {})
    found = compute_statistics(folder)
    assert found.identities_left_out == {}
    assert found.identities["own"] == IdentityStatistics(
        images=4,
        identities=2,
        cameras=2,
        images_per_identity={1: 1, 3: 1},
        cameras_per_identity={1: 1, 2: 1},
        # Person 1: two images have one positive, one has two; person 2 has none.
        positives_per_image={0: 1, 1: 2, 2: 1},
    )


def test_damaged_manifest_is_an_error(write_dataset: WriteDataset, tmp_path: Path) -> None:
    folder = write_dataset("own_set", [make_record(2, 2)])
    (tmp_path / "manifests").mkdir()
    pq.write_table(pa.table({"split": ["train"]}), tmp_path / "manifests" / "own.parquet")
    with pytest.raises(DataError, match=r"own\.parquet is not a manifest: it lacks person_id"):
        compute_statistics(folder)


def test_gallery_sizes_are_uniform_between_their_limits_where_one_image_is_right() -> None:
    uniform = dict.fromkeys(range(2, 6), 0.25)
    assert compute_gallery_shares(ONE_IMAGE, GallerySettings(min_size=2, max_size=5)) == uniform
    drawn = compute_gallery_shares(MANY_IMAGES, GallerySettings(min_size=2, max_size=5, matches="inverse"))
    assert drawn == pytest.approx(uniform)


def test_gallery_sizes_lean_to_large_ones_where_every_number_of_matches_is_as_frequent() -> None:
    # n = 2: N is 2, 3 or 4; n = 3: 3 or 4; n = 4: 4.
    shares = compute_gallery_shares(MANY_IMAGES, GallerySettings(min_size=2, max_size=4))
    assert shares == pytest.approx({2: 1 / 9, 3: 1 / 9 + 1 / 6, 4: 1 / 9 + 1 / 6 + 1 / 3})


def test_matches_are_mixed_over_the_gallery_sizes() -> None:
    # N = 2: n = 2 always. N = 3: 1/1 and 1/2, so 2/3 and 1/3. Each N has half of the weight.
    gallery = GallerySettings(min_size=2, max_size=3, matches="inverse")
    assert compute_match_shares(MANY_IMAGES, gallery) == pytest.approx({2: 1 / 2 + 1 / 3, 3: 1 / 6})
    # From 1 on: 1/2, 1/2 and 2/5, 2/5, 1/5.
    assert compute_match_shares(STAGE3, gallery) == pytest.approx({1: 0.45, 2: 0.45, 3: 0.1})
    uniform = GallerySettings(min_size=3, max_size=3, matches="uniform")
    assert compute_match_shares(MANY_IMAGES, uniform) == pytest.approx({2: 0.5, 3: 0.5})
    overall = GallerySettings(min_size=3, max_size=6)
    assert compute_match_shares(MANY_IMAGES, overall) == pytest.approx(dict.fromkeys(range(2, 7), 0.2))
    assert compute_match_shares(ONE_IMAGE, overall) == {}


def test_equation_1_holds_for_the_tasks_that_draw_several_matches() -> None:
    found = {name: smallest for name, task in TASKS.items() if (smallest := find_smallest_matches(task)) is not None}
    assert found.pop("image_to_image_many_to_many") == 2
    assert "standard_reid" in found
    assert set(found.values()) == {1}
    assert {TASKS[name].stages for name in found} == {(3,)}


def test_values_that_are_only_counted_or_only_intended_are_compared_as_well() -> None:
    found = compare(pa.array([3, 3, 9]), {2: 0.25, 3: 0.75})
    assert found == Comparison(counts={2: 0, 3: 2, 9: 1}, expected={2: 0.75, 3: 2.25, 9: 0.0})
    assert (found.mean, found.expected_mean) == (5, 2.75)
