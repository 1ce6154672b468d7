"""Tests of chatreid_plugin.eval.fusion and k_reciprocal: known small cases, and a slow reference of the formulas."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatreid_plugin.errors import DataError
from chatreid_plugin.eval.candidates import Plan, make_plan
from chatreid_plugin.eval.fusion import encode, estimate_mismatch, fuse_scores, iterate_jaccard_distances
from chatreid_plugin.eval.run import run_evaluation
from chatreid_plugin.eval.settings import EvalSettings
from chatreid_plugin.shards import read_manifest
from tests.support import alter


MakeWorld = Callable[..., Path]
MakeSettings = Callable[..., EvalSettings]


def make_clusters(people: int = 12, images: int = 9, size: int = 16) -> Any:
    """Return L2-normalised features (people * images, size), one noisy cluster a person."""
    generator = np.random.default_rng(0)
    centres = np.repeat(generator.normal(size=(people, size)), images, axis=0)
    features = centres + generator.normal(size=centres.shape)
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)


def rerank_densely(features: Any, queries: int, k1: int, k2: int, share: float) -> tuple[Any, Any]:
    """Return Zhong et al.'s final and Jaccard distances (queries, N - queries), with whole matrices and sets."""
    distances = 2.0 - 2.0 * features.astype(np.float64) @ features.T.astype(np.float64)
    np.fill_diagonal(distances, -1.0)
    order = np.argsort(distances, axis=1)
    np.fill_diagonal(distances, 0.0)
    distances /= distances.max(axis=1, keepdims=True)
    total = len(features)

    def find(image: int, k: int) -> set[int]:
        return {j for j in order[image, : k + 1].tolist() if image in order[j, : k + 1]}

    vectors = np.zeros((total, total))
    for image in range(total):
        near = find(image, k1)
        halves = [find(other, round(k1 / 2)) for other in near]
        members = list(near.union(*(half for half in halves if len(half & near) / len(half) > 2 / 3)))
        vectors[image, members] = np.exp(-distances[image, members])
        vectors[image] /= vectors[image].sum()
    if k2 > 1:
        vectors = np.stack([vectors[order[image, :k2]].mean(axis=0) for image in range(total)])
    least = np.minimum(vectors[:queries, None], vectors[None, queries:]).sum(axis=2)
    jaccard = 1.0 - least / (2.0 - least)
    return (1.0 - share) * jaccard + share * distances[:queries, queries:], jaccard


def test_features_of_a_file_are_reranked_without_image_files(
    make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path
) -> None:
    manifest = make_world(images=False)
    paths = [record.path for record in read_manifest(manifest)[0]]
    np.savez(tmp_path / "f.npz", paths=paths, features=make_clusters(4, 4))
    changes: dict[str, Any] = {"filter": "npz", "filter_features": tmp_path / "f.npz", "top_k": None}
    settings = make_settings(manifest, backend="features", fusion="k_reciprocal", **changes)
    assert 0 < run_evaluation(settings).ranking.mean_ap <= 1
    assert not (tmp_path / "images").exists()
    with pytest.raises(DataError, match="16 image file.s. of the manifest are not under"):
        run_evaluation(make_settings(manifest, backend="features", filter="colour"))


NEIGHBOURHOODS = [(20, 6), (7, 3), (5, 1), (2, 2), (2, 3), (2, 9), (3, 90)]


@pytest.mark.parametrize(("k1", "k2"), NEIGHBOURHOODS)
def test_jaccard_distances_equal_the_released_algorithms(k1: int, k2: int) -> None:
    features = make_clusters()
    found = np.stack(list(iterate_jaccard_distances(encode(features, k1, k2)[0], 10)))
    assert found == pytest.approx(rerank_densely(features, 10, k1, k2, 0.3)[1], abs=1e-6)
    assert found.std() > 0.005


@pytest.mark.parametrize(("k1", "k2"), NEIGHBOURHOODS)
def test_features_are_reranked_as_by_the_released_algorithm(
    k1: int, k2: int, make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path
) -> None:
    cameras = [("query", 1), ("query", 2), *(("gallery", camera) for camera in range(1, 8))]
    manifest = make_world([(split, str(person), str(camera)) for person in range(12) for split, camera in cameras])
    records, _ = read_manifest(manifest)
    np.savez(tmp_path / "f.npz", paths=[record.path for record in records], features=make_clusters())
    neighbours = {"k1": k1, "k2": k2, "fusion": "k_reciprocal", "backend": "features", "camera_rule": False}
    features = {"filter": "npz", "filter_features": tmp_path / "f.npz", "top_k": None}
    settings = make_settings(manifest, **neighbours, **features)
    plan = make_plan(settings)
    assert plan.features is not None
    together = np.concatenate([plan.features[0], plan.features[1]])
    expected = rerank_densely(together, 24, k1, k2, settings.scoring.lambda_value)[0]
    scores = [np.zeros(len(kept), dtype=np.float32) for kept in plan.kept]
    fused = fuse_scores(settings.scoring, plan, [scores], "margins")[0]
    for query, kept in enumerate(plan.kept):
        assert len(kept) == 84
        assert -fused[query] == pytest.approx(expected[query, kept], abs=1e-6)


def test_jaccard_distances_are_zero_when_all_images_are_one() -> None:
    features = np.tile(np.array([[1.0, 0.0]], dtype=np.float32), (4, 1))
    assert np.stack(list(iterate_jaccard_distances(encode(features, 20, 6)[0], 1))) == pytest.approx(0.0, abs=1e-6)


@pytest.fixture
def settings(make_world: MakeWorld, make_settings: MakeSettings) -> EvalSettings:
    return make_settings(make_world(), filter="colour", top_k=3, floor=0, backend="random")


def replace_plan(plan: Plan, query: list[float], gallery: list[list[float]]) -> None:
    """Give the plan's first query and its three candidates these features."""
    assert plan.features is not None
    plan.features[0][0] = np.resize(np.array(query), plan.features[0].shape[1]) * 0
    plan.features[0][0, : len(query)] = query
    for place, row in zip(plan.kept[0].tolist(), gallery, strict=True):
        plan.features[1][place] = 0
        plan.features[1][place, : len(row)] = row


def test_linear_adds_standardised_scores(settings: EvalSettings) -> None:
    plan = make_plan(settings)
    replace_plan(plan, [1.0], [[0.2], [0.4], [0.6]])
    scores = [np.array([30.0, 20.0, 10.0], dtype=np.float32)] * len(plan.kept)
    root = 1.2247449

    def fuse(weight: float) -> list[float]:
        changed = alter(settings, {"fusion": "linear", "fusion_weight": weight})
        return fuse_scores(changed.scoring, plan, [scores], "margins")[0][0].tolist()

    assert fuse(0.5) == pytest.approx([0.0, 0.0, 0.0], abs=1e-6)
    assert fuse(1.0) == pytest.approx([root, 0.0, -root], abs=1e-6)
    assert fuse(0.25) == pytest.approx([-root / 2, 0.0, root / 2], abs=1e-6)


def test_reciprocal_ranks_are_added_and_ties_share_theirs(settings: EvalSettings) -> None:
    plan = make_plan(settings)
    replace_plan(plan, [1.0], [[0.2], [0.4], [0.6]])
    changed = alter(settings, {"fusion": "reciprocal_rank"})
    scores = [np.array([5.0, 5.0, 1.0], dtype=np.float32)] * len(plan.kept)
    fused = fuse_scores(changed.scoring, plan, [scores], "margins")[0][0]
    expected = [1 / 61.5 + 1 / 63, 1 / 61.5 + 1 / 62, 1 / 63 + 1 / 61]
    assert fused.tolist() == pytest.approx(expected, rel=1e-6)


def test_k_reciprocal_joins_jaccard_baseline_and_model(settings: EvalSettings) -> None:
    plan = make_plan(settings)
    assert plan.features is not None
    changed = alter(settings, {"fusion": "k_reciprocal", "fusion_weight": 0.2, "k1": 4, "k2": 2})
    scores = [np.array([1.0, 3.0, 2.0], dtype=np.float32)] * len(plan.kept)
    fused = fuse_scores(changed.scoring, plan, [scores], "margins")[0][1]
    features = np.concatenate([plan.features[0], plan.features[1]])
    count, kept = len(plan.features[0]), plan.kept[1]
    jaccard = rerank_densely(features, count, 4, 2, 0.3)[1][1][kept]
    distances = 1.0 - features @ features[1]
    distance = 0.8 * distances[count:][kept] / distances.max() + 0.2 * np.array([1.0, 0.0, 0.5])
    assert fused.tolist() == pytest.approx((-0.7 * jaccard - 0.3 * distance).tolist(), abs=1e-5)


def test_p_no_comes_from_margins_alone(make_settings: MakeSettings) -> None:
    margins = np.array([0.0, np.log(3.0)], dtype=np.float32)
    model = make_settings(Path(), backend="http", model="m")
    assert estimate_mismatch(margins, model.scoring, "margins").tolist() == pytest.approx([0.5, 0.25])
    assert estimate_mismatch(margins, model.scoring, "answers").tolist() == [1.0, 0.0]
    choice = make_settings(Path(), backend="http", model="m", mode="choice")
    assert estimate_mismatch(margins, choice.scoring, "margins").tolist() == [1.0, 0.0]
    assert estimate_mismatch(margins[:1], choice.scoring, "margins").tolist() == [0.5]


def test_summed_margins_of_image_and_words_are_scaled(settings: EvalSettings) -> None:
    changes: dict[str, Any] = {
        "fusion": "k_reciprocal",
        "fusion_weight": 1.0,
        "lambda_value": 1.0,
        "backend": "http",
        "model": "m",
        "text_weight": 1.0,
    }
    changed = alter(settings, changes)
    plan = make_plan(settings)
    scores = [np.array([1.0, -1.0, 0.0], dtype=np.float32)] * len(plan.kept)
    queries = plan.benchmark.queries
    queries[0] = replace(queries[0], text="a red coat")
    fused = fuse_scores(changed.scoring, plan, [scores], "margins")[0]
    assert fused[0].tolist() == pytest.approx([0.0, -1.0, -0.5], abs=1e-6)
    assert fused[1].tolist() == pytest.approx([-0.268941, -0.731059, -0.5], abs=1e-5)


@pytest.mark.parametrize("fusion", ["linear", "reciprocal_rank", "k_reciprocal"])
def test_another_fusion_uses_the_saved_scores(settings: EvalSettings, fusion: str) -> None:
    run_evaluation(settings)
    saved = {path.name: path.read_bytes() for path in settings.output.output_dir.glob("scores-*")}
    plain = json.loads((settings.output.output_dir / "results.json").read_text(encoding="utf-8"))["metrics"]
    run_evaluation(alter(settings, {"fusion": fusion}))
    assert {path.name: path.read_bytes() for path in settings.output.output_dir.glob("scores-*")} == saved
    assert json.loads((settings.output.output_dir / "results.json").read_text(encoding="utf-8"))["metrics"] != plain


def test_refuses_fusion_without_a_filter(make_settings: MakeSettings) -> None:
    with pytest.raises(ValueError, match="filter.source must not be none"):
        make_settings(Path(), fusion="linear")
