"""Benchmarks of several trials: each is filtered, fused and measured as if there were no other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatreid_plugin.eval.candidates import make_plan
from chatreid_plugin.eval.loader import load_benchmark
from chatreid_plugin.eval.measure import measure
from chatreid_plugin.eval.run import run_evaluation
from chatreid_plugin.eval.settings import EvalSettings
from chatreid_plugin.shards import read_json, read_manifest
from tests.support import alter


MakeSettings = Callable[..., EvalSettings]
ParseLayout = Callable[[str], Path]

BENCHMARKS: dict[str, dict[str, Any]] = {
    "sysumm01": {"protocol": "sysumm01"},
    "llcm": {"protocol": "llcm"},
    "prcc": {"protocol": "prcc", "shots": "single"},
}


@pytest.fixture(params=sorted(BENCHMARKS))
def settings(request: pytest.FixtureRequest, parse_layout: ParseLayout, make_settings: MakeSettings) -> EvalSettings:
    changes = {"filter": "colour", "top_k": 5, "floor": 0, "report_queries": 2}
    return make_settings(parse_layout(request.param), **BENCHMARKS[request.param], **changes)


def run(settings: EvalSettings, **changes: Any) -> Any:
    folder = settings.output.output_dir / "-".join(f"{value}" for value in changes.values())
    return run_evaluation(alter(settings, {**changes, "output_dir": folder}))


def test_one_trial_is_the_first_of_several_when_filtered(settings: EvalSettings) -> None:
    one, several = (run(settings, trials=count, backend="features").measured for count in (1, 3))
    assert len(one.trials) == 1 and len(several.trials) == 3
    assert one.trials[0].mean_ap == pytest.approx(several.trials[0].mean_ap, abs=1e-12)
    assert one.ranking.mean_ap == pytest.approx(one.baseline.mean_ap, abs=1e-12)


def test_scores_stay_with_their_images_when_there_is_one_trial(settings: EvalSettings) -> None:
    plan = make_plan(alter(settings, {"trials": 1}))
    scores = [np.arange(len(kept), dtype=np.float32) for kept in plan.kept]
    (shared,) = plan.share_scores(scores)
    for kept, values, chosen, given in zip(plan.kept, scores, plan.trial_candidates[0], shared, strict=True):
        known = dict(zip(kept.tolist(), values.tolist(), strict=True))
        assert given.tolist() == [known[index] for index in chosen.tolist()]
    perfect = [
        np.array([record.person_id == query.person_id for record in plan.list_candidates(place)], dtype=np.float32)
        for place, query in enumerate(plan.benchmark.queries)
    ]
    measured = measure(plan, plan.share_scores(perfect))
    assert measured.ranking.mean_ap == pytest.approx(measured.ceiling.mean_ap, abs=1e-12)


@pytest.mark.parametrize("fusion", ["linear", "reciprocal_rank", "k_reciprocal"])
def test_a_trial_does_not_depend_on_others_when_fused(settings: EvalSettings, fusion: str) -> None:
    changes: dict[str, Any] = {"fusion": fusion, "fusion_weight": 0.2, "k1": 4, "k2": 2}
    found = [run(settings, trials=count, **changes).measured.trials for count in (1, 2, 5)]
    for more in found[1:]:
        for one, other in zip(found[0], more, strict=False):
            assert one.average_precisions == pytest.approx(other.average_precisions, abs=1e-9)


@pytest.mark.parametrize("changes", [{}, {"setting": "indoor"}, {"shots": "multi"}, {"trials_from": "agw_seed"}])
def test_gallery_of_sysu_is_what_some_trial_ranks(
    changes: dict[str, Any], parse_layout: ParseLayout, make_settings: MakeSettings
) -> None:
    settings = make_settings(parse_layout("sysumm01"), protocol="sysumm01", trials=2, **changes)
    results = run_evaluation(settings)
    benchmark = results.benchmark
    assert set(np.concatenate(benchmark.trials).tolist()) == set(range(len(benchmark.gallery)))
    cameras = {"1", "2"} if "setting" in changes else {"1", "2", "4", "5"}
    assert {record.camera_id for record in benchmark.gallery} == cameras
    assert read_json(settings.output.output_dir / "results.json")["protocol"]["gallery"] == len(benchmark.gallery)


def test_gallery_has_what_some_trial_ranks_and_no_more(settings: EvalSettings) -> None:
    benchmark = load_benchmark(alter(settings, {"trials": 1}).data)
    assert benchmark.trials[0].tolist() == list(range(len(benchmark.gallery)))
    records, _ = read_manifest(settings.data.manifest)
    assert len(benchmark.gallery) < len(records)
