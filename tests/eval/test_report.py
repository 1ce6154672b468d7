"""Tests of chatreid_plugin.eval.report and html: what the files hold, and that the page needs nothing else."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatreid_plugin.eval.candidates import make_plan
from chatreid_plugin.eval.report import RANKING_SCHEMA, render_table
from chatreid_plugin.eval.run import run_evaluation
from chatreid_plugin.eval.settings import EvalSettings
from chatreid_plugin.shards import read_json, read_manifest, read_shard


MakeWorld = Callable[..., Path]
MakeSettings = Callable[..., EvalSettings]
ParseLayout = Callable[[str], Path]
ParsePage = Callable[[str], Any]


def test_results_json_says_how_it_came_about(make_world: MakeWorld, make_settings: MakeSettings) -> None:
    settings = make_settings(make_world(), filter="colour", top_k=3)
    results = run_evaluation(settings)
    content = read_json(settings.output.output_dir / "results.json")
    assert content["metrics"]["mAP"] == results.ranking.mean_ap
    assert set(content["metrics"]) >= {"mAP", "mAP_interval", "Rank-1", "Rank-20", "mINP", "tie_rate", "valid_queries"}
    assert content["strict"]["mAP"] == results.strict.mean_ap
    assert content["filter"]["recall"] == results.filter_recall
    assert content["filter"]["mean_candidates"] == 3
    assert content["protocol"]["pairs_scored"] == 12
    assert content["settings"]["filter"]["top_k"] == 3
    assert content["versions"]["numpy"]
    assert content["provenance"]["manifest_provenance"]["made_by"] == "test"
    assert len(content["provenance"]["manifest_sha256"]) == 64
    assert Path(content["provenance"]["scores"]).is_file()


@pytest.mark.parametrize(
    ("layout", "variant", "trials", "cmc", "definition"),
    [
        ("market1501", "single query, same identity and same camera ignored", 1, "standard", "standard CMC"),
        (
            "llcm",
            "infrared to visible, 3 trials, same identity and same camera ignored",
            3,
            "unique_identity",
            "k identities",
        ),
        (
            "sysumm01",
            "all-search, single-shot, 3 trials (published), for camera 3 the gallery of camera 2 ignored",
            3,
            "unique_identity",
            "k identities",
        ),
    ],
)
@pytest.mark.parametrize(("average_precision", "ties"), [("mean", "expected"), ("top500", "index")])
def test_results_json_names_what_was_measured(
    layout: str,
    variant: str,
    trials: int,
    cmc: str,
    definition: str,
    average_precision: str,
    ties: str,
    parse_layout: ParseLayout,
    make_settings: MakeSettings,
) -> None:
    changes: dict[str, Any] = {"filter": "colour", "top_k": 4, "trials": 3, "report_queries": 0}
    changes |= {"protocol": layout, "average_precision": average_precision}
    settings = make_settings(parse_layout(layout), **changes)
    run_evaluation(settings)
    content = read_json(settings.output.output_dir / "results.json")
    benchmark, definitions = content["protocol"], content["definitions"]
    assert (benchmark["name"], benchmark["variant"]) == (layout, variant)
    assert benchmark["trials"] == len(content["trials"]) == trials
    assert (benchmark["cmc"], benchmark["average_precision"], benchmark["ties"]) == (cmc, average_precision, ties)
    assert definition in definitions["Rank-k"]
    assert ("first 500" in definitions["mAP"]) == (average_precision == "top500")
    assert ("gallery order" in definitions["ties"]) == (ties == "index")
    assert content["filter"]["source"] == "colour"


def test_skipped_queries_are_in_the_results(make_world: MakeWorld, make_settings: MakeSettings) -> None:
    items = [("query", "1", "1"), ("query", "2", "1"), ("gallery", "1", "2"), ("gallery", "2", "1")]
    settings = make_settings(make_world(items))
    assert "1 valid queries (1 skipped)" in render_table(run_evaluation(settings))
    (skipped,) = read_json(settings.output.output_dir / "results.json")["protocol"]["skipped_queries"]
    assert "only seen by the query's own camera 1" in skipped["reason"]


def test_rankings_list_candidates_first_and_then_the_tail(make_world: MakeWorld, make_settings: MakeSettings) -> None:
    settings = make_settings(make_world(), filter="colour", top_k=3, floor=0)
    run_evaluation(settings)
    rows = read_shard(settings.output.output_dir / "rankings.parquet", RANKING_SCHEMA).to_pylist()
    assert len(rows) == 4
    for row in rows:
        assert len(row["gallery_ids"]) == len(row["scores"]) == len(row["matches"]) == 11
        assert row["scores"][:3] == sorted(row["scores"][:3], reverse=True)
        assert row["scores"][3:] == [None] * 8
        assert sum(row["matches"]) == 2
        assert all(item.startswith("tiny/gallery/") for item in row["gallery_ids"])


def test_rankings_have_the_figures_whose_means_are_quoted(
    make_world: MakeWorld, make_settings: MakeSettings, parse_layout: ParseLayout
) -> None:
    trials: dict[str, Any] = {"protocol": "llcm", "trials": 3}
    for manifest, changes in ((make_world(), {}), (parse_layout("llcm"), trials)):
        settings = make_settings(manifest, backend="random", report_queries=0, **changes)
        results = run_evaluation(settings)
        rows = read_shard(settings.output.output_dir / "rankings.parquet", RANKING_SCHEMA).to_pylist()
        metrics = read_json(settings.output.output_dir / "results.json")["metrics"]
        assert np.mean([row["average_precision"] for row in rows]) == pytest.approx(metrics["mAP"], abs=1e-12)
        assert np.mean([row["inverse_negative_penalty"] for row in rows]) == pytest.approx(metrics["mINP"], abs=1e-12)
        assert len({row["average_precision"] for row in rows}) > 1
        assert [row["first_match"] for row in rows] == [row["matches"].index(True) + 1 for row in rows]
        first = results.measured.trials[0].cmc[1]
        assert np.mean([row["first_match"] == 1 for row in rows]) == pytest.approx(first)


def test_table_is_in_percent_with_its_definitions(make_world: MakeWorld, make_settings: MakeSettings) -> None:
    table = render_table(run_evaluation(make_settings(make_world(), filter="colour")))
    assert re.search(r"^mAP +100\.00 +100\.00 +100\.00 +\d+\.\d\d$", table, re.MULTILINE)
    for word in ("Rank-20", "mINP", "strict: ", "ceiling: ", "baseline: ", "tie rate", "recall 100.00"):
        assert word in table


def test_page_needs_nothing_from_elsewhere(
    make_world: MakeWorld, make_settings: MakeSettings, parse_page: ParsePage
) -> None:
    settings = make_settings(make_world(), backend="random", report_queries=3)
    results = run_evaluation(settings)
    text = (settings.output.output_dir / "report.html").read_text(encoding="utf-8")
    page = parse_page(text)
    assert page.open == []
    assert "http" not in text.replace("data:image", "")
    assert all(image["src"].startswith("data:image/") for image in page.find("img"))
    assert sum(image["src"].startswith("data:image/png") for image in page.find("img")) == 1  # the CMC curve
    assert all(image["alt"] for image in page.find("img"))
    assert not page.find("link")
    assert len(page.find("section")) == 3
    shown = [float(value) for value in re.findall(r"<h2>AP ([\d.]+)", text)]
    assert shown == sorted(shown)
    assert shown == [round(100 * value, 2) for value in sorted(results.ranking.average_precisions)[:3]]
    assert text.count("✓</span>") + text.count("✗</span>") == len(page.find("figure", "same")) + len(
        page.find("figure", "other")
    )


def test_page_shows_the_first_trials_precisions_when_there_are_several(
    parse_layout: ParseLayout, make_settings: MakeSettings
) -> None:
    changes: dict[str, Any] = {"protocol": "llcm", "backend": "random", "trials": 3, "report_queries": 4}
    settings = make_settings(parse_layout("llcm"), **changes)
    measured = run_evaluation(settings).measured
    text = (settings.output.output_dir / "report.html").read_text(encoding="utf-8")
    shown = re.findall(r"<h2>AP ([\d.]+) in the first trial", text)
    own = sorted(measured.trials[0].average_precisions)[:4]
    assert [float(value) for value in shown] == [round(100 * value, 2) for value in own]
    assert own != sorted(measured.ranking.average_precisions)[:4]
    assert "means of 3 trials, galleries and their AP the first trial's" in text


@pytest.mark.parametrize(
    "scores", [np.array([0.5, 0.5 + 1e-12]), np.array([2**40, 2**40 + 1]), np.array([False, True])]
)
def test_galleries_are_ordered_as_the_metrics_are_when_float32_would_tie(
    make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path, scores: Any
) -> None:
    manifest = make_world()
    records, _ = read_manifest(manifest)
    paths = [record.path for record in records]
    same = [[int(one.person_id == other.person_id) for other in records] for one in records]
    np.savez(tmp_path / "s.npz", scores=scores[np.array(same)], queries=paths, gallery=paths)
    settings = make_settings(manifest, backend="scores", scores=tmp_path / "s.npz")
    assert run_evaluation(settings).ranking.mean_ap == 1.0
    rows = read_shard(settings.output.output_dir / "rankings.parquet", RANKING_SCHEMA).to_pylist()
    assert [row["matches"][:3] for row in rows] == [[True, True, False]] * 4
    assert [row["scores"][0] for row in rows] == [np.float32(scores[1])] * 4
    assert "Wrong at rank 1: 0<" in (settings.output.output_dir / "report.html").read_text(encoding="utf-8")


def test_page_shows_missed_matches_below_the_first_ten(
    make_world: MakeWorld, make_settings: MakeSettings, parse_page: ParsePage
) -> None:
    items = [("query", "1", "1"), ("gallery", "1", "2")] + [("gallery", "2", str(camera)) for camera in range(14)]
    settings = make_settings(make_world(items), backend="random", filter="none", seed=1)
    results = run_evaluation(settings)
    text = (settings.output.output_dir / "report.html").read_text(encoding="utf-8")
    assert results.ranking.cmc[10] == 0.0
    assert "Missed: 1 match below" in text
    assert len(parse_page(text).find("figure", "same")) == 1


def test_page_escapes_text_from_outside(make_world: MakeWorld, make_settings: MakeSettings) -> None:
    items = [("query", "1", "<script>x</script>".replace("/", "")), ("gallery", "1", "2"), ("gallery", "3", "<b>")]
    settings = make_settings(make_world(items))
    run_evaluation(settings)
    text = (settings.output.output_dir / "report.html").read_text(encoding="utf-8")
    assert "cam &lt;script&gt;" in text
    assert "cam <" not in text


def test_page_is_written_when_no_query_is_to_be_shown(make_world: MakeWorld, make_settings: MakeSettings) -> None:
    settings = make_settings(make_world(), report_queries=0)
    run_evaluation(settings)
    assert "output.report_queries: 0" in (settings.output.output_dir / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "confidence"),
    [
        ({"backend": "features", "filter": "colour"}, "similarities"),
        ({"backend": "features", "filter": "colour", "mode": "choice"}, "log_odds"),
        ({"backend": "random"}, "none"),
        ({"backend": "oracle", "mode": "turns"}, "none"),
        ({"backend": "features", "features": "f.npz"}, "similarities"),
        ({"backend": "scores", "scores": "s.npz"}, "external"),
    ],
)
def test_results_say_what_the_scores_are(
    make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path, changes: dict[str, Any], confidence: str
) -> None:
    manifest = make_world()
    records, _ = read_manifest(manifest)
    paths = [record.path for record in records]
    np.savez(tmp_path / "f.npz", paths=paths, features=np.random.default_rng(0).random((len(paths), 4)))
    np.savez(tmp_path / "s.npz", scores=np.zeros((len(paths), len(paths))), queries=paths, gallery=paths)
    files = {key: tmp_path / value for key, value in changes.items() if key in ("features", "scores")}
    settings = make_settings(manifest, **changes | files)
    run_evaluation(settings)
    assert read_json(settings.output.output_dir / "results.json")["scores"]["confidence"] == confidence


def test_recall_is_given_at_several_cuts_of_the_filters_ranking(
    make_world: MakeWorld, make_settings: MakeSettings
) -> None:
    settings = make_settings(make_world(), filter="colour", top_k=7, floor=0)
    results = run_evaluation(settings)
    plan = make_plan(settings)
    expected = {}
    for cut in (1, 5, 7):
        shares = []
        for query, kept in enumerate(plan.kept):
            matches = plan.labels.find_positives(query)
            shares.append(matches[kept[:cut]].sum() / matches.sum())
        expected[str(cut)] = pytest.approx(np.mean(shares))
    content = read_json(settings.output.output_dir / "results.json")["filter"]
    assert content["recall_at"] == expected
    assert content["recall_at"]["7"] == content["recall"] > content["recall_at"]["1"]
    assert "filter recall at 1: 50.00, 5: 100.00, 7: 100.00" in render_table(results)
    assert "Recall@5" in (settings.output.output_dir / "report.html").read_text(encoding="utf-8")


def test_recall_is_given_once_when_nothing_is_filtered(make_world: MakeWorld, make_settings: MakeSettings) -> None:
    settings = make_settings(make_world())
    assert "recall at" not in render_table(run_evaluation(settings))
    assert read_json(settings.output.output_dir / "results.json")["filter"]["recall_at"] == {}
