"""tau: auto: the threshold keeps the wanted share of training identities' matches, by the benchmark's own rules."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatreid_plugin.datasets.matching import label_benchmark
from chatreid_plugin.errors import ConfigError, DataError
from chatreid_plugin.eval.batch import describe_plan
from chatreid_plugin.eval.calibration import IMAGES_OF_A_PERSON, Calibration, draw_sample, load_training
from chatreid_plugin.eval.candidates import make_plan
from chatreid_plugin.eval.loader import load_benchmark
from chatreid_plugin.eval.report import render_table
from chatreid_plugin.eval.run import run_evaluation
from chatreid_plugin.eval.settings import EvalSettings
from chatreid_plugin.search import ranking
from chatreid_plugin.shards import read_json, read_manifest
from tests.support import alter


MakeWorld = Callable[..., Path]
MakeSettings = Callable[..., EvalSettings]
Item = tuple[str, str, str]

PEOPLE = 50
TEST = [("query", "1", "1"), ("gallery", "1", "2"), ("gallery", "1", "3"), ("gallery", "2", "2")]
TEST += [("query", "2", "2"), ("gallery", "2", "1")]
SPLITS = ["query", "gallery"]


def list_items() -> list[Item]:
    """Return fifty training people, each twice before camera 1 and once before camera 2, and a small test set."""
    train = [("train", str(person), camera) for person in range(PEOPLE) for camera in ("1", "1", "2")]
    return [*train, *TEST]


def write_features(manifest: Path, path: Path) -> Path:
    """Write features by which person p before cameras 1 and 2 is similar by 0.5 + p / 100, and alike before camera 1.

    The first query's gallery has similarities of 0.9, 0.4, 0.7 and 0.3.
    """
    records, _ = read_manifest(manifest)
    similar = {"gallery/1_c2": 0.9, "gallery/1_c3": 0.4, "gallery/2_c2": 0.7, "gallery/2_c1": 0.3}
    cosines: list[float] = []
    for record in records:
        person, camera = int(record.person_id.partition(":")[2]), record.camera_id
        apart = 0.5 + person / 100 if camera == "2" else 1.0
        name = record.path.rpartition("_")[0]
        cosines.append(apart if record.split == "train" else similar.get(name, 1.0))
    values = np.array(cosines)
    np.savez(path, paths=[r.path for r in records], features=np.stack([values, np.sqrt(1 - values**2)], axis=1))
    return path


@pytest.fixture
def settings(make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path) -> EvalSettings:
    """Return the settings of an evaluation whose filter's similarities are known."""
    manifest = make_world(list_items(), images=False)
    features = write_features(manifest, tmp_path / "f.npz")
    changes = {"filter": "npz", "filter_features": features, "tau": "auto", "floor": 0, "backend": "random"}
    return make_settings(manifest, **changes)


def change(settings: EvalSettings, **changes: Any) -> EvalSettings:
    return alter(settings, changes)


@pytest.mark.parametrize(
    ("recall", "tau", "kept"), [(1.0, 0.5, [0, 2]), (0.9, 0.55, [0, 2]), (0.5, 0.75, [0]), (0.02, 0.99, [])]
)
def test_keeps_the_wanted_share_of_matches_in_other_cameras(
    settings: EvalSettings, recall: float, tau: float, kept: list[int]
) -> None:
    plan = make_plan(change(settings, filter_recall=recall))
    found = plan.calibration
    assert found is not None and found.tau == pytest.approx(tau, abs=1e-6)
    # Each image of camera 1 finds that of camera 2, which finds both: 4 pairs a person.
    assert (found.pairs, found.identities, found.images) == (4 * PEOPLE, PEOPLE, 3 * PEOPLE)
    assert found.recall == pytest.approx(recall)
    assert plan.kept[0].tolist() == kept


def test_what_matches_is_the_evaluations_own_rule(settings: EvalSettings) -> None:
    everything = make_plan(change(settings, camera_rule=False)).calibration
    assert everything is not None and everything.pairs == 6 * PEOPLE  # those of the same camera, but not with itself


def test_top_k_and_floor_go_on_to_count(settings: EvalSettings) -> None:
    assert make_plan(change(settings, filter_recall=0.9, top_k=1)).kept[0].tolist() == [0]
    assert make_plan(change(settings, filter_recall=0.02, floor=3)).kept[0].tolist() == [0, 2, 1]
    fixed = make_plan(change(settings, tau=0.8))
    assert fixed.calibration is None and fixed.kept[0].tolist() == [0]


def test_says_what_it_found_wherever_the_filter_is_described(
    settings: EvalSettings, caplog: pytest.LogCaptureFixture
) -> None:
    results = run_evaluation(change(settings, filter_recall=0.9))
    line = (
        "tau: auto found 0.5500, which 90.00 % of 200 matches of training identities reach (50 people on 150 images)"
    )
    content = read_json(settings.output.output_dir / "results.json")
    assert line in render_table(results) and line in caplog.text
    assert line in (settings.output.output_dir / "report.html").read_text()
    assert content["filter"]["tau"] == pytest.approx(0.55)
    found = {"recall": 0.9, "pairs": 200, "images": 150, "identities": 50, "reason": ""}
    assert content["filter"]["calibration"] == pytest.approx(found | {"tau": content["filter"]["tau"]})
    assert (content["settings"]["filter"]["tau"], content["settings"]["filter"]["recall"]) == ("auto", 0.9)
    assert read_json(run_with_tau(settings, 0.8) / "results.json")["filter"]["tau"] == 0.8


def run_with_tau(settings: EvalSettings, tau: float) -> Path:
    run_evaluation(change(settings, tau=tau))
    return settings.output.output_dir


@pytest.mark.parametrize("lack", ["train", "matches", "features", "images"])
def test_without_a_threshold_top_k_decides_and_the_reason_is_said(
    make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path, lack: str, caplog: pytest.LogCaptureFixture
) -> None:
    train = [("train", person, camera) for person in ("3", "4") for camera in ("1", "2")]
    items = {"train": [], "matches": train[::2]}.get(lack, train)
    manifest = make_world([*items, *TEST])
    records, root = read_manifest(manifest)
    known = [record.path for record in records if record.split in SPLITS]
    np.savez(tmp_path / "f.npz", paths=known, features=np.eye(len(known)) + 0.1)
    if lack == "images":
        shutil.rmtree(root / "train")
    changes = {"filter": "npz", "filter_features": tmp_path / "f.npz"} if lack == "features" else {"filter": "colour"}
    results = run_evaluation(make_settings(manifest, **changes, top_k=2, floor=0))
    filtered = read_json(results.settings.output.output_dir / "results.json")["filter"]
    reasons = {
        "train": "no images of split train",
        "matches": "no training image drawn has a match",
        "features": "lacks the features of 4 of 4 queries",
        "images": "4 image file(s) of the manifest are not under",
    }
    assert filtered["tau"] == -1 and reasons[lack] in filtered["calibration"]["reason"]
    assert filtered["mean_candidates"] == 2
    assert "tau: auto found no threshold, so top_k alone decides" in caplog.text


# What asks and what is ranked: modality and, where they tell the sides apart, cameras.
SIDES = {
    "ltcc_cc-ltcc-True": (("visible", None), ("visible", None)),
    "prcc_cross_clothes_single-prcc": (("visible", "C"), ("visible", "A")),
    "sysumm01_indoor_single-sysumm01": (("infrared", "36"), ("visible", "12")),
    "sysumm01_all_multi-sysumm01": (("infrared", "36"), ("visible", "1245")),
    "regdb_infrared_to_visible-regdb": (("infrared", None), ("visible", None)),
    "cuhkpedes-cuhkpedes": (None, ("visible", None)),
    "multimodal-cuhkpedes": (("visible", None), ("visible", None)),
}


@pytest.mark.parametrize("case", SIDES, indirect=True)
def test_training_images_stand_where_the_benchmarks_stand(case: Any, make_case: Callable[..., EvalSettings]) -> None:
    settings = make_case(filter="colour", tau="auto")
    manifest = Path(str(settings.data.manifest).replace("{trial}", "1"))
    settings = alter(settings, {"manifest": manifest, "splits": ()})
    benchmark = load_benchmark(settings.data)
    training = load_training(settings.data, benchmark)
    assert training.rule == benchmark.rule and not training.trials
    asking = [query.image for query in training.queries]
    for found, expected in zip((asking, training.gallery), SIDES[case.name], strict=True):
        records = [record for record in found if record is not None]
        modality, cameras = expected or (None, None)
        assert {record.modality for record in records} == ({modality} if modality else set())
        assert cameras is None or {record.camera_id for record in records} <= set(cameras)
    labels = label_benchmark(training)
    assert sum(len(labels.list_positives(query)) for query in range(len(training.queries))) > 0
    people = {record.person_id for record in read_manifest(manifest)[0] if record.split == "train"}
    assert {record.person_id for record in [*training.queries, *training.gallery]} <= people


def test_the_sample_is_bounded_seeded_and_of_many_people(make_world: MakeWorld) -> None:
    records, _ = read_manifest(make_world([("train", str(n % 30), str(n)) for n in range(600)], images=False))
    drawn = draw_sample(records, 1, 100)
    assert len(drawn) == 100 and len({record.image_id for record in drawn}) == 100
    people = [record.person_id for record in drawn]
    assert max(people.count(person) for person in people) == IMAGES_OF_A_PERSON and len(set(people)) == 13
    assert drawn == draw_sample(records, 1, 100) != draw_sample(records, 2, 100)
    assert len(draw_sample(records, 1, 10_000)) == 30 * IMAGES_OF_A_PERSON


@pytest.fixture
def vlm(make_world: MakeWorld, make_settings: MakeSettings, checkpoint: Path, tmp_path: Path) -> EvalSettings:
    """Return the settings of an evaluation in which a tiny checkpoint, which may be taken away, filters and scores."""
    train = [("train", person, camera) for person in "5678" for camera in "123"]
    test = [(split, person, camera) for split, cameras in (("query", "1"), ("gallery", "123")) for person in "1234"
            for camera in cameras]  # fmt: skip
    model = shutil.copytree(checkpoint, tmp_path / "model")
    changes = {"backend": "transformers", "filter": "vlm", "filter_recall": 0.5, "floor": 1, "device": "cpu"}
    return make_settings(make_world([*train, *test]), model_name_or_path=str(model), **changes)


def test_the_model_filters_by_a_threshold_and_keeps_no_training_image(vlm: EvalSettings) -> None:
    plan = make_plan(vlm)
    assert plan.scorer is not None and plan.calibration is not None and plan.calibration.pairs == 8
    known: Any = plan.scorer
    assert len(known.features) == 16  # four queries and twelve gallery images
    assert 0 < plan.calibration.tau < 1


def test_processes_have_the_first_ones_threshold(
    vlm: EvalSettings, run_together: Callable[..., list[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    settings = alter(vlm, {"filter": "colour"})
    alone = make_plan(settings)
    caplog.clear()
    other = alter(settings, {"seed": 1, "filter_recall": 1.0})  # as if its device rounded differently
    for plan in run_together([partial(make_plan, settings), partial(make_plan, other)]):
        assert plan.calibration == alone.calibration
        assert [kept.tolist() for kept in plan.kept] == [kept.tolist() for kept in alone.kept]
    assert caplog.text.count("tau: auto found") == 1


def test_scores_of_the_default_filter_are_ranked_again_without_the_model(vlm: EvalSettings) -> None:
    names = ("results.json", "rankings.parquet", "report.html")
    fused = alter(vlm, {"fusion": "linear"})
    run_evaluation(fused)
    expected = {name: (vlm.output.output_dir / name).read_bytes() for name in names}
    run_evaluation(vlm)
    Path(str(vlm.model.model_name_or_path)).rename(vlm.output.output_dir.parent / "elsewhere")
    saved = alter(fused, {"saved_scores": True})
    run_evaluation(saved)
    assert {name: (vlm.output.output_dir / name).read_bytes() for name in names} == expected
    with pytest.raises(DataError, match=r"filter\.npz are of another run: filter.recall differ"):
        run_evaluation(alter(saved, {"filter_recall": 0.9}))
    (vlm.output.output_dir / "filter.npz").unlink()
    with pytest.raises(DataError, match="the features by which filter.source: vlm chose candidates, is missing"):
        run_evaluation(saved)


def test_backends_without_a_model_say_which_filter_to_set(make_settings: MakeSettings) -> None:
    for backend in ("http", "random", "oracle", "features"):
        with pytest.raises(ValueError, match="filter.source=npz filter.features=FILE.npz .*filter.source=colour or"):
            make_settings(Path(), filter="vlm", backend=backend)
    assert make_settings(Path(), filter="vlm", backend="scores", scores=Path("s.npz")).filter.source == "vlm"
    assert make_settings(Path(), filter="vlm", backend="features", features=Path("f.npz")).scoring.reads_scores


def test_dry_run_tells_pairs_and_hours(vlm: EvalSettings) -> None:
    text = describe_plan(vlm)
    assert "at most 48 pairs to score" in text and "at most 12 candidates a query" in text
    assert "0.0 hours at 100 pairs a second" in text and "or fewer, as tau leaves out" in text
    assert "hours" not in describe_plan(alter(vlm, {"backend": "random", "filter": "none"}))


def test_a_line_for_people() -> None:
    assert Calibration(reason="none.").describe().endswith("top_k alone decides: none.")
    with pytest.raises(ConfigError, match="tau: auto needs training identities"):
        ranking.make_settings(None, ["filter.tau=auto"])
