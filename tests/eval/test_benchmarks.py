"""Every benchmark on its own synthetic layout: an oracle is perfect, chance is chance, rules are as published."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatreid_plugin.datasets.matching import label_benchmark
from chatreid_plugin.errors import ConfigError, DataError
from chatreid_plugin.eval.backends.files import RandomScorer
from chatreid_plugin.eval.candidates import make_plan
from chatreid_plugin.eval.filter import list_query_names
from chatreid_plugin.eval.loader import load_benchmark
from chatreid_plugin.eval.measure import measure
from chatreid_plugin.eval.questions import IMAGE_PAIR
from chatreid_plugin.eval.run import run_evaluation
from chatreid_plugin.eval.settings import EvalSettings
from chatreid_plugin.eval.splits import choose_split
from chatreid_plugin.shards import read_json, read_manifest
from tests.support import alter, make_eval_settings


ParseLayout = Callable[[str], Path]
MakeCase = Callable[..., EvalSettings]


def make(manifest: Path, tmp_path: Path, **changes: Any) -> EvalSettings:
    values = {"manifest": manifest, "backend": "oracle", "filter": "none", "output_dir": tmp_path / "out"}
    return make_eval_settings(values | {"report_queries": 1} | changes)


def test_every_shipped_yaml_has_a_case(all_cases: Mapping[str, Any]) -> None:
    shipped = {path.stem for path in (Path(__file__).parents[2] / "eval").glob("*.yaml")}
    assert {case.recipe for case in all_cases.values()} == shipped


def test_oracle_is_perfect(case: Any, make_case: MakeCase) -> None:
    results = run_evaluation(make_case())
    for metrics in (results.ranking, results.strict, results.ceiling, *results.measured.trials):
        assert metrics.mean_ap == pytest.approx(1.0, abs=1e-12)
        assert metrics.mean_inp == pytest.approx(1.0, abs=1e-12)
        assert metrics.cmc[1] == pytest.approx(1.0, abs=1e-12)
    assert results.filter_recall == 1.0
    assert len(results.measured.trials) == case.trials
    asked = [len(one.benchmark.queries) for one in results.splits or (results,)]
    assert results.ranking.valid_queries == sum(asked) and min(asked) > 0


def test_random_scores_agree_with_their_expectation(case: Any, make_case: MakeCase) -> None:
    settings = make_case()
    settings = choose_split(settings, 2) if settings.data.splits else alter(settings, {"trials": 2})
    plan = make_plan(settings)
    # Rank-1 by chance: a match is as likely to come first as any other image, or identity if one of each is drawn.
    chances: list[float] = []
    for places in plan.benchmark.trial_galleries:
        inside = plan.labels.take_gallery(places)
        for query in range(len(plan.benchmark.queries)):
            kept = ~inside.find_ignored(query)
            if plan.benchmark.cmc == "single_gallery_shot":
                chances.append(1 / len(np.unique(inside.gallery_person[kept])))
            else:
                chances.append(inside.find_positives(query).sum() / kept.sum())
    assert np.mean(chances) < 1  # or the oracle would prove nothing
    tied = [np.zeros(len(kept), dtype=np.float32) for kept in plan.kept]
    assert measure(plan, plan.share_scores(tied)).ranking.cmc[1] == pytest.approx(np.mean(chances), abs=1e-9)

    def draw(seed: int) -> float:
        scorer = RandomScorer(seed)
        queries = enumerate(plan.benchmark.queries)
        scores = [scorer.score_pairs(query, plan.list_candidates(index), IMAGE_PAIR) for index, query in queries]
        return measure(plan, plan.share_scores(scores)).ranking.cmc[1]

    drawn = [draw(seed) for seed in range(12)]
    assert abs(np.mean(drawn) - np.mean(chances)) <= 5 * np.std(drawn) / np.sqrt(len(drawn)) + 0.02


@pytest.mark.parametrize(
    "case",
    ["ltcc_cc-ltcc", "sysumm01_all_single-sysumm01", "attributes-rapv1", "cuhkpedes-cuhkpedes"],
    indirect=True,
)
def test_scores_of_a_file_are_measured_as_a_scorers(make_case: MakeCase, tmp_path: Path) -> None:
    settings = make_case()
    benchmark = make_plan(settings).benchmark
    scores = np.random.default_rng(3).random((len(benchmark.queries), len(benchmark.gallery)), dtype=np.float32)
    queries = [list_query_names(query)[0] for query in benchmark.queries]
    gallery = [record.path for record in benchmark.gallery]
    np.savez(tmp_path / "s.npz", scores=scores, queries=queries, gallery=gallery)
    found = run_evaluation(make_case(backend="scores", scores=tmp_path / "s.npz"))
    plan = make_plan(settings)
    expected = measure(plan, plan.share_scores([scores[query][kept] for query, kept in enumerate(plan.kept)]))
    assert 0 < found.ranking.mean_ap < 1
    assert found.ranking.mean_ap == pytest.approx(expected.ranking.mean_ap, abs=1e-12)
    assert found.ranking.cmc == pytest.approx(expected.ranking.cmc, abs=1e-12)
    assert len(found.measured.trials) == len(expected.trials)


def test_ignored_images_are_those_of_the_rule(make_case: MakeCase) -> None:
    settings = make_case()
    benchmark = load_benchmark((choose_split(settings, 1) if settings.data.splits else settings).data)
    labels = label_benchmark(benchmark)
    for place, query in enumerate(benchmark.queries):
        expected: list[bool] = []
        for record in benchmark.gallery:
            same, camera = record.person_id == query.person_id, record.camera_id == query.camera_id
            clothes = record.clothes_id is not None and record.clothes_id == query.clothes_id
            expected.append(
                {
                    "nothing": False,
                    "same_camera": same and camera,
                    "cloth_changing": same and (camera or clothes),
                    "same_clothes": same and (camera or not clothes),
                    "same_room": query.camera_id == "3" and record.camera_id == "2",
                    "same_image": record.image_id == query.query_id,
                }[benchmark.rule]
            )
        assert labels.find_ignored(place).tolist() == expected


def test_sysu_galleries_follow_the_published_trials(parse_layout: ParseLayout, tmp_path: Path) -> None:
    manifest = parse_layout("sysumm01")
    single = load_benchmark(make(manifest, tmp_path, protocol="sysumm01").data)
    multi = load_benchmark(make(manifest, tmp_path, protocol="sysumm01", shots="multi").data)
    indoor = load_benchmark(make(manifest, tmp_path, protocol="sysumm01", setting="indoor").data)
    for one, many, inside in zip(single.trials, multi.trials, indoor.trials, strict=True):
        shots = ((single, one), (multi, many))
        shown = [(single.gallery[place].person_id, single.gallery[place].camera_id) for place in one.tolist()]
        assert len(set(shown)) == len(shown)
        paths = [{benchmark.gallery[place].path for place in trial.tolist()} for benchmark, trial in shots]
        assert paths[0] <= paths[1]
        assert {indoor.gallery[place].camera_id for place in inside.tolist()} == {"1", "2"}
    assert any(not np.array_equal(single.trials[0], trial) for trial in single.trials)
    assert {query.camera_id for query in single.queries} == {"3", "6"}


def test_sysu_people_without_indoor_images_are_skipped_and_counted(parse_layout: ParseLayout, tmp_path: Path) -> None:
    benchmark = load_benchmark(make(parse_layout("sysumm01"), tmp_path, protocol="sysumm01", setting="indoor").data)
    assert {item.reason for item in benchmark.skipped} == {
        "identity sysumm01:0007 has no match in the gallery of 10 of 10 trials"
    }
    assert "sysumm01:0007" not in {query.person_id for query in benchmark.queries}


def test_agw_seeding_draws_as_a_seeded_module_would(parse_layout: ParseLayout, tmp_path: Path) -> None:
    import random

    settings = make(parse_layout("sysumm01"), tmp_path, protocol="sysumm01", trials_from="agw_seed")
    benchmark = load_benchmark(settings.data)
    files: dict[tuple[str, str], list[str]] = {}
    for record in (record for record in read_manifest(settings.data.manifest)[0] if record.split == "gallery"):
        files.setdefault((record.person_id, record.camera_id), []).append(record.path)
    random.seed(4)
    expected = [
        random.choice(sorted(files[person, camera]))
        for person in sorted({person for person, _ in files})
        for camera in ("1", "2", "4", "5")
        if (person, camera) in files
    ]
    drawn = [benchmark.gallery[place].path for place in benchmark.trials[4].tolist()]
    assert sorted(drawn) == sorted(expected)


def test_text_sets_ask_every_caption_and_match_every_image(parse_layout: ParseLayout, tmp_path: Path) -> None:
    benchmark = load_benchmark(make(parse_layout("cuhkpedes"), tmp_path, protocol="cuhkpedes").data)
    assert [query.text for query in benchmark.queries] == [
        caption for record in benchmark.gallery for caption in record.captions
    ]
    assert all(query.image is None for query in benchmark.queries)
    with pytest.raises(ConfigError, match="filter.source: colour compares images"):
        run_evaluation(make(parse_layout("cuhkpedes"), tmp_path, protocol="cuhkpedes", filter="colour"))


def test_attributes_ask_for_the_named_ones_alone(parse_layout: ParseLayout, tmp_path: Path) -> None:
    manifest = parse_layout("rapv1")
    every = load_benchmark(make(manifest, tmp_path, protocol="attributes").data)
    name = sorted(every.queries[0].attributes)[0]
    one = load_benchmark(make(manifest, tmp_path, protocol="attributes", attributes=[name]).data)
    assert all(list(query.attributes) == [name] for query in one.queries)
    assert len(one.queries) <= len(every.queries)
    with pytest.raises(DataError, match="no gallery image has all of the attributes tail"):
        load_benchmark(make(manifest, tmp_path, protocol="attributes", attributes=["tail"]).data)


def test_images_of_an_attribute_set_ask_with_their_attributes(parse_layout: ParseLayout, tmp_path: Path) -> None:
    benchmark = load_benchmark(
        make(parse_layout("rapv1"), tmp_path, protocol="multimodal", attributes=["gender"]).data
    )
    assert len(benchmark.queries) == len(benchmark.gallery) > 1
    assert all(query.image is not None and list(query.attributes) == ["gender"] for query in benchmark.queries)
    assert {query.person_id for query in benchmark.queries} == {"attributes:gender=female", "attributes:gender=male"}
    assert (
        benchmark.variant
        == f"image with gender, {len(benchmark.gallery)} labelled images, the query's own image ignored"
    )
    with pytest.raises(DataError, match="no gallery image has all of the attributes tail"):
        load_benchmark(make(parse_layout("rapv1"), tmp_path, protocol="multimodal", attributes=["tail"]).data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "ltcc", "setting": "all"}, "choose one of cc, standard, sc"),
        ({"protocol": "market1501", "shots": "single"}, "shots: single does not fit benchmark market1501"),
        ({"protocol": "market1501", "restrict": True}, "restrict: True does not fit"),
        ({"protocol": "regdb", "splits": [1]}, "belong together"),
    ],
)
def test_refuses_keys_of_another_protocol(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "m.parquet", tmp_path, **changes)


def test_classic_and_new_cuhk03_are_not_mixed_up(parse_layout: ParseLayout, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cuhk03_classic"):
        load_benchmark(make(parse_layout("cuhk03:detected_classic"), tmp_path, protocol="cuhk03").data)
    with pytest.raises(DataError, match="detected_classic"):
        load_benchmark(make(parse_layout("cuhk03:detected"), tmp_path, protocol="cuhk03_classic").data)


def test_sysu_without_published_trials_falls_back_and_says_so(
    parse_layout: ParseLayout, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = parse_layout("sysumm01")
    manifest = source.with_name("sysu_alone.parquet")
    manifest.write_bytes(source.read_bytes())
    provenance = read_json(source.with_name(source.name + ".json"))
    manifest.with_name(manifest.name + ".json").write_text(json.dumps(provenance | {"protocol": {}}))
    benchmark = load_benchmark(make(manifest, tmp_path, protocol="sysumm01").data)
    seeded = load_benchmark(make(source, tmp_path, protocol="sysumm01", trials_from="agw_seed").data)
    assert benchmark.variant == seeded.variant and "10 trials (agw_seed)" in benchmark.variant
    assert all(np.array_equal(one, other) for one, other in zip(benchmark.trials, seeded.trials, strict=True))
    assert "10 trials (agw_seed)" in caplog.text and "rand_perm_cam.mat" in caplog.text
    for keys in ({"trials_from": "published"}, {"shots": "multi"}):
        with pytest.raises(DataError, match=r"Put rand_perm_cam\.mat"):
            load_benchmark(make(manifest, tmp_path, protocol="sysumm01", **keys).data)


def test_splits_carry_the_skipped_queries_of_all(
    make_world: Callable[..., Path], make_settings: Callable[..., EvalSettings], copy_splits: Callable[..., Path]
) -> None:
    items = [("query", "1", "1"), ("gallery", "1", "2"), ("query", "2", "1")]
    settings = make_settings(copy_splits(make_world(items), (1, 2)), splits=(1, 2))
    run_evaluation(settings)
    content = read_json(settings.output.output_dir / "results.json")
    assert len(content["protocol"]["skipped_queries"]) == 2
    assert [split["skipped_queries"] for split in content["splits"]] == [1, 1]
