"""Tests of chatreid_plugin.engine.plan: shares are exact, and what is left out is said with its reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatreid_plugin.config import BuildSettings
from chatreid_plugin.engine.plan import BuildReport, name_dataset, plan_datasets, share_out
from chatreid_plugin.engine.sampler import ImagePool
from chatreid_plugin.errors import ConfigError
from chatreid_plugin.tasks import TASKS, list_stage_tasks


MakePool = Callable[..., ImagePool]


def make_settings(**changes: Any) -> BuildSettings:
    return BuildSettings.model_validate(
        {"sources": [{"name": "own", "root": "raw"}], "records": {"stage1": 1}} | changes
    )


def plan(recipe: BuildSettings, *pools: ImagePool) -> tuple[dict[str, int], dict[str, str]]:
    """Return the plan and what is left out."""
    report = BuildReport(Path("out"))
    planned = plan_datasets(recipe, pools, report)
    assert all(dataset.name == name_dataset(dataset.task, dataset.stage) for dataset in planned)
    return {dataset.task: dataset.records for dataset in planned}, report.skipped


@settings(deadline=None)
@given(st.integers(0, 10**7), st.dictionaries(st.text(max_size=3), st.floats(1e-6, 1e6), min_size=1, max_size=8))
def test_shares_add_up_and_are_less_than_one_away(total: int, weights: dict[str, float]) -> None:
    shares = share_out(total, weights)
    assert list(shares) == list(weights)
    assert sum(shares.values()) == total
    for name, count in shares.items():
        assert abs(count - total * weights[name] / sum(weights.values())) < 1 + 1e-6


@pytest.mark.parametrize(
    ("total", "weights", "expected"),
    [
        # 3.5, 3.0, 0.5: the first of the equal remainders gets the record that is left.
        (7, {"a": 7, "b": 6, "c": 1}, {"a": 4, "b": 3, "c": 0}),
        (5, {"a": 1, "b": 1, "c": 1}, {"a": 2, "b": 2, "c": 1}),
        # 1.4, 6.2, 2.4: one record left for 0.4, the first of two.
        (10, {"a": 0.14, "b": 0.62, "c": 0.24}, {"a": 2, "b": 6, "c": 2}),
        (10, {"a": 0.13, "b": 0.62, "c": 0.25}, {"a": 1, "b": 6, "c": 3}),
        (3, {"a": 1, "b": 0}, {"a": 3, "b": 0}),
        (5, {}, {}),
    ],
)
def test_largest_remainders_round_up(total: int, weights: dict[str, float], expected: dict[str, int]) -> None:
    assert share_out(total, weights) == expected


@pytest.mark.parametrize("total", [1, 99, 1000, 3_000_000])
def test_stage_2_follows_the_papers_ratios_exactly(make_pool: MakePool, total: int) -> None:
    counts, skipped = plan(make_settings(records={"stage2": total}), make_pool())
    assert sum(counts.values()) == total
    for task in list_stage_tasks(2):
        share = 0.25 if task.name.startswith("image_to_image") else 0.1
        assert abs(counts.get(task.name, 0) - total * share) < 1
    # Only what rounds to nothing is left out.
    assert all("less than one" in reason for reason in skipped.values())


def test_stage_3_is_shared_out_among_what_can_be_built(make_pool: MakePool) -> None:
    recipe = make_settings(records={"stage3": 1000})
    counts, skipped = plan(recipe, make_pool(cameras=6, outfits=3, infrared=2, views=True))
    assert (counts, skipped) == ({name: round(1000 * share) for name, share in recipe.stage3_ratios.items()}, {})
    counts, skipped = plan(recipe, make_pool(views=True))
    # 28 % of the mix has no labels here.
    assert counts == {name: round(1000 * recipe.stage3_ratios[name] / 0.72) for name in counts}
    assert sum(counts.values()) == 1000
    assert skipped == {
        "chatreid_stage3_cloth_changing_reid": "no identity in two outfits and two cameras",
        "chatreid_stage3_visible_infrared_reid": "no identity both visible and infrared",
    }


def test_stage_3_ratios_are_the_ones_asked_for(make_pool: MakePool) -> None:
    ratios = {"standard_reid": 3.0, "attribute_retrieval": 1.0, "multimodal_retrieval": 0.0}
    counts, skipped = plan(make_settings(records={"stage3": 40}, stage3_ratios=ratios), make_pool())
    assert counts == {"standard_reid": 30, "attribute_retrieval": 10}
    assert skipped["chatreid_stage3_multimodal_retrieval"] == "no share in stage3_ratios"
    assert skipped["chatreid_stage3_text_to_image_reid"] == "no share in stage3_ratios"


def test_a_task_is_built_if_one_source_can(make_pool: MakePool) -> None:
    counts, skipped = plan(make_settings(records={"stage1": 5}), make_pool(captions=()), make_pool())
    assert (counts, skipped) == ({"image_captioning": 5}, {})


def test_reasons_of_all_sources_are_named(make_pool: MakePool) -> None:
    pools = make_pool(people=1), make_pool(cameras=1)
    _, skipped = plan(make_settings(records={"stage3": 5}), *pools)
    assert skipped["chatreid_stage3_standard_reid"] == "no identity seen by two cameras, only one identity"


def test_source_counts_only_for_the_stages_it_trains(make_pool: MakePool) -> None:
    source = {"name": "own", "root": "raw", "stages": [3]}
    records = {"stage1": 5, "stage3": 5}
    recipe = make_settings(sources=[source], records=records, stage3_ratios={"standard_reid": 1})
    counts, skipped = plan(recipe, make_pool())
    assert counts == {"standard_reid": 5}
    assert skipped["chatreid_stage1_image_captioning"] == "no source trains this stage"


def test_pairs_across_modalities_need_no_second_camera_of_one(make_pool: MakePool) -> None:
    # As in RegDB: one visible and one infrared camera.
    pool = make_pool(cameras=2, infrared=1)
    recipe = {"records": {"stage2": 10}, "stage2_ratios": {"image_to_image_one_to_one": 1}}
    assert plan(make_settings(**recipe), pool)[0] == {"image_to_image_one_to_one": 10}
    same_modality = make_settings(sources=[{"name": "own", "root": "raw", "change": {"camera": 1}}], **recipe)
    counts, skipped = plan(same_modality, pool)
    assert counts == {}
    assert skipped["chatreid_stage2_image_to_image_one_to_one"] == "no identity seen by two cameras"


def test_share_of_less_than_one_record_is_said(make_pool: MakePool) -> None:
    ratios = {"attribute_prediction": 1.0, "image_to_image_one_to_one": 0.001}
    counts, skipped = plan(make_settings(records={"stage2": 10}, stage2_ratios=ratios), make_pool())
    assert counts == {"attribute_prediction": 10}
    name = name_dataset("image_to_image_one_to_one", 2)
    assert skipped[name] == "its share of 10 records is less than one"


def test_data_sets_are_named_after_stage_and_task() -> None:
    assert name_dataset("image_captioning", 1) == "chatreid_stage1_image_captioning"
    names = [name_dataset(task.name, stage) for task in TASKS.values() for stage in task.stages]
    assert len(set(names)) == len(names) == 19


def test_report_lists_everything() -> None:
    report = BuildReport(Path("out"), {"a": 12345}, {"b": "no captions"}, ["a"], 3000, 1.5)
    assert [line.split() for line in report.render().splitlines()] == [
        ["a", "12,345", "records"],
        ["b", "left", "out:", "no", "captions"],
        ["3,000", "records", "written", "in", "1.5", "s", "(2,000", "records/s)"],
        ["dataset_dir:", "out"],
    ]
    assert json.loads(report.to_json()) == {
        "output_dir": "out",
        "datasets": {"a": 12345},
        "skipped": {"b": "no captions"},
        "reused": ["a"],
        "written": 3000,
        "seconds": 1.5,
    }


def test_report_ends_with_the_commands_that_train_what_was_built() -> None:
    names = ["chatreid_stage1_image_captioning", *(name_dataset(task.name, 2) for task in list_stage_tasks(2))]
    names += ["chatreid_stage3_standard_reid", "chatreid_stage3_attribute_retrieval"]
    report = BuildReport(Path("dataset_info"), dict.fromkeys(names, 1), written=1)
    train = "  FORCE_TORCHRUN=1 llamafactory-cli train examples"
    lines = report.render().splitlines()
    assert lines[-3:] == [f"{train}/stage1.yaml", f"{train}/stage2.yaml", f"{train}/stage3.yaml"]
    assert lines[-4].startswith("Next (on one GPU without FORCE_TORCHRUN=1 and with deepspeed=null)")
    assert not any(line.startswith("Tasks without") for line in lines)
    report = BuildReport(Path("dataset_info"), dict.fromkeys(names, 1))
    assert "Next" not in report.render()  # a plan: nothing was built


def test_report_says_how_stage_2_trains_without_stage_1() -> None:
    built = name_dataset("image_to_image_one_to_one", 2)
    names = name_dataset("image_captioning", 1), name_dataset("attribute_comparison", 2)
    skipped = dict(zip(names, ("no captions", "no attributes"), strict=True))
    lines = BuildReport(Path("my data"), {built: 5}, skipped, reused=[built]).render().splitlines()
    command = "FORCE_TORCHRUN=1 llamafactory-cli train examples/stage2.yaml"
    assert lines[-1] == f"  {command} chatreid_encoder=null dataset_dir='my data'"
    assert lines[-3].startswith("Tasks without captions or attributes are left out. To train them, write a `captions`")
    # Another recipe's Stage 1 may be there.
    lines = BuildReport(Path("dataset_info"), {built: 5}, {}, reused=[built]).render().splitlines()
    assert lines[-1] == f"  {command}"


def test_recipe_without_records_is_refused() -> None:
    with pytest.raises(ConfigError, match="`records` names no stage"):
        plan(make_settings(records={}))
