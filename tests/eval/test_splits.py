"""Benchmarks of several splits: each is an evaluation of its own, and their unweighted mean is what is quoted."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatreid_plugin.errors import ConfigError, DataError
from chatreid_plugin.eval.backends.base import Confidence
from chatreid_plugin.eval.batch import describe_plan
from chatreid_plugin.eval.measure import average_metrics
from chatreid_plugin.eval.metrics import RankingMetrics, bootstrap_interval, evaluate_ranking
from chatreid_plugin.eval.report import render_table
from chatreid_plugin.eval.run import run_evaluation
from chatreid_plugin.eval.settings import EvalSettings
from chatreid_plugin.eval.splits import average_splits, choose_split
from chatreid_plugin.shards import read_json, read_manifest, write_manifest
from tests.support import alter, place_key


MakeWorld = Callable[..., Path]
MakeSettings = Callable[..., EvalSettings]
ParseLayout = Callable[[str], Path]


@pytest.mark.parametrize(
    ("layout", "protocol", "variant"),
    [
        ("regdb", "regdb", "visible to infrared, {}, nothing ignored"),
        (
            "cuhk03:detected_classic",
            "cuhk03_classic",
            "classic, {}, detected boxes, same identity and same camera ignored",
        ),
    ],
)
def test_splits_are_evaluated_apart_and_averaged(
    layout: str,
    protocol: str,
    variant: str,
    parse_layout: ParseLayout,
    copy_splits: Callable[..., Path],
    make_settings: MakeSettings,
    tmp_path: Path,
) -> None:
    source = parse_layout(layout)
    settings = make_settings(copy_splits(source, (1, 2)), protocol=protocol, backend="random", splits=[1, 2])
    assert "2 splits; split 1:" in describe_plan(settings)
    results = run_evaluation(settings)
    assert results.benchmark.variant == variant.format("mean of 2 splits")
    assert f"{protocol} ({results.benchmark.variant})" in render_table(results)
    assert len(results.measured.trials) == 2
    assert (tmp_path / "out" / "split2" / "rankings.parquet").exists()
    alone = run_evaluation(make_settings(source, protocol=protocol, backend="random", output_dir=tmp_path / "one"))
    assert alone.benchmark.variant == variant.format("split 1")
    content = read_json(tmp_path / "out" / "results.json")
    assert content["protocol"]["variant"] == results.benchmark.variant
    assert [split["variant"] for split in content["splits"]] == [variant.format(f"split {n}") for n in (1, 2)]
    assert content["protocol"]["queries"] == 2 * len(alone.benchmark.queries)
    assert content["protocol"]["pairs_scored"] == 2 * alone.pairs == sum(s["pairs_scored"] for s in content["splits"])
    assert content["filter"]["mean_candidates"] == alone.pairs / len(alone.benchmark.queries)
    assert content["provenance"] is None
    manifests = [Path(split["provenance"]["manifest"]).name for split in content["splits"]]
    assert manifests == [f"{source.stem}_split{trial}.parquet" for trial in (1, 2)]
    assert [split["folder"] for split in content["splits"]] == ["split1", "split2"]
    assert results.ranking.mean_ap == pytest.approx(alone.ranking.mean_ap)


def test_a_manifest_of_another_split_is_refused_when_it_is_named_for_this_one(
    parse_layout: ParseLayout, make_settings: MakeSettings, tmp_path: Path
) -> None:
    """A recipe whose source got another name but kept its trial: ten times the first split is no mean of ten."""
    source, pattern = parse_layout("regdb"), tmp_path / "regdb{trial}.parquet"
    for number, suffix in product((1, 2), ("", ".json")):
        shutil.copy(f"{source}{suffix}", f"{pattern}{suffix}".replace("{trial}", str(number)))
    settings = make_settings(pattern, protocol="regdb", splits=[1, 2])
    with pytest.raises(DataError, match=r"regdb2\.parquet stands for split 2, but was parsed as split 1\..*trial: 2"):
        run_evaluation(settings)


def test_every_splits_manifest_and_model_is_looked_for_before_the_first_is_scored(
    make_world: MakeWorld, make_settings: MakeSettings, copy_splits: Callable[..., Path], tmp_path: Path
) -> None:
    settings = make_settings(copy_splits(make_world(), (1, 2)), splits=[1, 2, 5, 7])
    with pytest.raises(DataError, match=r"tiny_split\{trial\}\.parquet does not exist for split 5, 7\."):
        run_evaluation(settings)
    (tmp_path / "run_1").mkdir()
    changes = {"splits": (1, 2), "backend": "transformers", "model_name_or_path": str(tmp_path / "run_{trial}")}
    with pytest.raises(ConfigError, match=r"run_2 does not exist.*trains them"):
        run_evaluation(alter(settings, changes))
    assert not (settings.output.output_dir / "split1").exists()


def measure_split(precisions: Sequence[float]) -> RankingMetrics:
    """Return the metrics of a query for each average precision, 1 or 0.5."""
    scores = [[1.0, 0.0] if precision == 1.0 else [0.0, 1.0] for precision in precisions]
    return evaluate_ranking(np.array(scores), [1] * len(scores), [1, 2])


@pytest.mark.parametrize("sizes", [(3, 3), (3, 4)])
def test_splits_count_alike_when_their_queries_are_not_the_same(sizes: tuple[int, int]) -> None:
    mean = average_metrics([measure_split([1.0] * sizes[0]), measure_split([0.5] * sizes[1])], same_queries=False)
    assert mean.mean_ap == 0.75
    assert mean.interval == (0.75, 0.75)
    assert mean.valid_queries == len(mean.average_precisions) == len(mean.query_indices) == sum(sizes)


def test_trials_average_each_query() -> None:
    mean = average_metrics([measure_split([1.0, 1.0, 0.5]), measure_split([0.5, 1.0, 0.5])], same_queries=True)
    assert mean.average_precisions.tolist() == [0.75, 1.0, 0.5]
    assert mean.mean_ap == pytest.approx(0.75)
    assert mean.valid_queries == 3
    assert mean.interval == bootstrap_interval(np.array([0.75, 1.0, 0.5]))


def test_queries_of_all_splits_are_counted(make_world: MakeWorld, make_settings: MakeSettings) -> None:
    manifest = make_world()
    records, root = read_manifest(manifest)
    for trial, people in ((1, "123"), (2, "234")):
        chosen = [record for record in records if record.split == "gallery" or record.person_id[-1] in people]
        chosen = chosen if trial == 1 else chosen[:-1]
        write_manifest(manifest.with_name(f"m{trial}.parquet"), chosen, root, {"made_by": "test"})
    settings = make_settings(manifest.with_name("m{trial}.parquet"), splits=[1, 2], backend="random")
    results = run_evaluation(settings)
    content = read_json(settings.output.output_dir / "results.json")
    assert content["metrics"]["valid_queries"] == results.ranking.valid_queries == 6
    assert content["protocol"]["queries"] == 6
    assert content["protocol"]["gallery"] == 11.5
    assert content["protocol"]["variant"].endswith("; mean of 2 splits")
    assert content["protocol"]["splits"] == len(content["splits"]) == 2
    assert content["protocol"]["trials"] == 1
    assert content["metrics"]["mAP"] == pytest.approx(np.mean([one["mAP"] for one in content["trials"]]))
    assert "6 valid queries (0 skipped), 11 to 12 gallery images a split, 63 pairs scored" in render_table(results)
    assert "Mean of 2 splits, between which" in render_table(results)


@pytest.mark.parametrize(
    ("confidences", "weakest"),
    [
        (("margins", "top_logprobs"), "top_logprobs"),
        (("top_logprobs", "answers", "margins"), "answers"),
        (("log_odds", "log_odds"), "log_odds"),
    ],
)
def test_mean_is_as_weak_as_its_weakest_split(
    make_world: MakeWorld, make_settings: MakeSettings, confidences: Sequence[Confidence], weakest: str
) -> None:
    split = run_evaluation(make_settings(make_world()))
    mean = average_splits([replace(split, confidence=confidence) for confidence in confidences])
    assert mean.confidence == weakest


def test_every_path_and_name_has_the_number_of_its_split(make_settings: MakeSettings) -> None:
    files = ("manifest", "image_root", "filter_features", "filter_weights", "features", "scores")
    names = ("model_name_or_path", "adapter_name_or_path", "filter_model", "model", "base_url")
    changes: dict[str, Any] = {key: Path(f"{key}_{{trial}}") for key in files}
    changes |= {key: f"{key}_{{trial}}" for key in names}
    settings = alter(make_settings(Path("m{trial}"), splits=[7]), changes)
    split = choose_split(settings, 7)
    for key, value in changes.items():
        for section, _, name in (place.partition(".") for place in place_key(key)):
            assert getattr(getattr(split, section), name) == type(value)(f"{key}_7")
    assert split.data.splits == ()
    assert split.output.output_dir == settings.output.output_dir / "split7"
    assert split.scoring.backend == settings.scoring.backend
