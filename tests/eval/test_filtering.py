"""Tests of chatreid_plugin.eval.filter: its sources, and tau, top_k and floor."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from chatreid_plugin.errors import ConfigError, DataError
from chatreid_plugin.eval.candidates import make_plan
from chatreid_plugin.eval.filter import (
    describe_colours,
    extract_features,
    filter_gallery,
    is_cut_through_ties,
    iterate_similarities,
    number_distinct,
)
from chatreid_plugin.eval.settings import EvalSettings
from chatreid_plugin.shards import read_manifest


MakeWorld = Callable[..., Path]
MakeSettings = Callable[..., EvalSettings]


def ignore_nothing(query: int) -> Any:
    return np.zeros(5, dtype=np.bool_)


def make_features(similarities: list[float]) -> tuple[Any, Any]:
    """Return one query and a gallery on the unit circle with these similarities."""
    gallery = np.array([[value, np.sqrt(1 - value**2)] for value in similarities], dtype=np.float32)
    return np.array([[1, 0]], dtype=np.float32), gallery


@pytest.mark.parametrize(
    ("tau", "top_k", "floor", "expected"),
    [
        (-1.0, None, 0, [3, 1, 0, 4, 2]),
        (0.5, None, 0, [3, 1, 0]),
        (0.5, 2, 0, [3, 1]),
        (0.95, None, 2, [3, 1]),
        (0.95, None, 0, []),
        (0.95, None, 99, [3, 1, 0, 4, 2]),
        (-1.0, 2, 4, [3, 1]),
    ],
)
def test_keeps_by_tau_top_k_and_floor(tau: float, top_k: int | None, floor: int, expected: list[int]) -> None:
    query, gallery = make_features([0.5, 0.8, -0.2, 0.9, 0.1])
    assert [kept.tolist() for kept in filter_gallery(query, gallery, ignore_nothing, tau, top_k, floor)] == [expected]


def test_no_threshold_keeps_an_opposite_image_when_float32_rounds_below_minus_one() -> None:
    vectors = np.random.default_rng(0).normal(size=(200, 1, 337)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    lowest = min(vectors, key=lambda vector: float(next(iterate_similarities(vector, -vector))[0]))
    assert next(iterate_similarities(lowest, -lowest))[0] < -1.0
    (kept,) = filter_gallery(lowest, np.concatenate([-lowest, lowest]), lambda query: np.zeros(2, bool), -1.0, None, 0)
    assert kept.tolist() == [1, 0]


def test_removes_ignored_images_before_counting() -> None:
    query, gallery = make_features([0.5, 0.8, -0.2, 0.9, 0.1])
    kept = filter_gallery(query, gallery, lambda query: np.arange(5) == 3, -1.0, 2, 0)
    assert kept[0].tolist() == [1, 0]


def test_equal_similarities_keep_gallery_order() -> None:
    query, gallery = make_features([0.5, 0.5, 0.9, 0.5, 0.5])
    assert filter_gallery(query, gallery, ignore_nothing, -1.0, 3, 0)[0].tolist() == [2, 0, 1]


@pytest.mark.parametrize("top_k", [1, 7, 50, 199, 200, 300])
def test_takes_the_same_as_sorting_whole_rows_when_many_are_tied(top_k: int) -> None:
    generator = np.random.default_rng(top_k)
    query, gallery = make_features((generator.integers(-4, 5, size=200) / 5).tolist())
    ignored = generator.random(200) < 0.2
    kept = filter_gallery(query, gallery, lambda query: ignored, -1.0, top_k, 0)[0]
    similarities = next(iterate_similarities(query, gallery))
    order = [place for place in np.argsort(-similarities, kind="stable").tolist() if not ignored[place]]
    assert kept.tolist() == order[:top_k]


def test_equal_rows_have_one_number_when_zeros_differ_in_sign() -> None:
    features = np.array([[1, 0], [0, 1], [1, -0.0], [0, 1], [1, 1e-7]], dtype=np.float32)
    assert number_distinct(features).tolist() == [0, 1, 0, 1, 4]


@pytest.mark.parametrize("queries", [1, 3, 65])
def test_equal_vectors_are_equally_similar_wherever_they_stand(queries: int) -> None:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(queries + 2, 337)).astype(np.float32)
    for copies in range(1, 62):
        gallery = np.repeat(vectors[-2:], [copies, 3], axis=0)[generator.permutation(copies + 3)]
        for row in iterate_similarities(vectors[:queries], gallery):
            assert len(set(row.tolist())) == 2


def test_says_whether_the_cut_goes_through_ties() -> None:
    similarities, ignored = np.array([0.5, 0.9, 0.5, 0.1, 0.1], dtype=np.float32), np.arange(5) == 4
    found = [is_cut_through_ties(similarities, np.array(kept), ignored) for kept in ([1], [1, 0], [1, 0, 2, 3])]
    assert found == [False, True, False]
    assert not is_cut_through_ties(similarities, np.array([], dtype=np.int64), ignored)


def test_similarities_are_the_same_in_chunks() -> None:
    generator = np.random.default_rng(0)
    queries = generator.normal(size=(150, 8)).astype(np.float32)
    gallery = generator.normal(size=(20, 8)).astype(np.float32)
    assert np.allclose(np.stack(list(iterate_similarities(queries, gallery))), queries @ gallery.T, atol=1e-5)


def test_colours_tell_people_apart_and_not_exposures() -> None:
    shading = np.linspace(0.3, 1.0, 30)[None, :, None]
    colours = np.repeat([[200, 30, 30], [30, 30, 200]], 30, axis=0)[:, None, :]
    red_over_blue = Image.fromarray((colours * shading).astype(np.uint8))
    darker = red_over_blue.point(lambda value: round(value * 0.6))
    blue_over_red = red_over_blue.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    first, second, third = (describe_colours(image) for image in (red_over_blue, darker, blue_over_red))

    def compare(one: Any, other: Any) -> float:
        return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))

    assert compare(first, second) > 0.9 > compare(first, third) + 0.1


def test_colour_features_are_normalised_and_find_the_person(
    make_world: MakeWorld, make_settings: MakeSettings
) -> None:
    records, root = read_manifest(make_world())
    features = extract_features(records, root, make_settings(Path(), filter="colour").filter)
    assert features.dtype == np.float32
    assert np.linalg.norm(features, axis=1) == pytest.approx(1.0, abs=1e-5)
    best = np.argmax(features[:4] @ features[4:].T, axis=1)
    assert [records[4 + index].person_id for index in best] == [record.person_id for record in records[:4]]


def test_names_an_image_that_cannot_be_read(make_world: MakeWorld, make_settings: MakeSettings) -> None:
    records, root = read_manifest(make_world())
    (root / records[3].path).write_bytes(b"no image")
    with pytest.raises(DataError, match=records[3].path):
        extract_features(records, root, make_settings(Path(), filter="colour").filter)


def write_npz(path: Path, paths: list[str], features: Any) -> Path:
    np.savez(path, paths=np.array(paths), features=np.array(features))
    return path


def test_npz_features_are_found_by_path(make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path) -> None:
    manifest = make_world()
    records, _ = read_manifest(manifest)  # the queries come first
    values = np.arange(1, len(records) + 1)[:, None] * np.array([[3.0, 4.0]])
    values[:, 0] += np.arange(len(records))
    paths = [record.path for record in records]
    file = write_npz(tmp_path / "f.npz", ["extra.png", *paths[::-1]], np.vstack([[[9.0, 9.0]], values[::-1]]))
    plan = make_plan(make_settings(manifest, filter="npz", filter_features=file))
    assert plan.features is not None
    found = np.concatenate([plan.features[0], plan.features[1]])
    assert np.allclose(found, values / np.linalg.norm(values, axis=1, keepdims=True), atol=1e-6)


def test_npz_names_the_images_it_lacks(make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path) -> None:
    manifest = make_world()
    paths = [record.path for record in read_manifest(manifest)[0]]
    file = write_npz(tmp_path / "f.npz", paths[:-1], np.ones((len(paths) - 1, 2)))
    with pytest.raises(DataError, match=rf"lacks the features of 1 of 12 gallery images:\n  {paths[-1]}"):
        make_plan(make_settings(manifest, filter="npz", filter_features=file))


@pytest.mark.parametrize("content", ["missing", "text", "keys", "shapes", "nan", "zero"])
def test_npz_faults_are_data_errors(
    make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path, content: str
) -> None:
    manifest = make_world()
    file = tmp_path / "f.npz"
    paths = [record.path for record in read_manifest(manifest)[0]]
    if content == "text":
        file.write_text("no archive")
    elif content == "keys":
        np.savez(file, names=np.array(paths))
    elif content == "shapes":
        write_npz(file, paths, np.ones((3, 2)))
    elif content == "nan":
        write_npz(file, paths, np.full((len(paths), 2), np.nan))
    elif content == "zero":
        write_npz(file, paths, np.zeros((len(paths), 2)))
    with pytest.raises(DataError, match=r"f\.npz"):
        make_plan(make_settings(manifest, filter="npz", filter_features=file))


def test_no_filter_has_no_features(make_settings: MakeSettings) -> None:
    with pytest.raises(ConfigError, match="nothing to compare"):
        extract_features([], Path(), make_settings(Path(), filter="none").filter)


@pytest.mark.slow
def test_torchvision_features_come_from_local_weights(
    make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    weights = tmp_path / "resnet50.pth"
    torch.save(models.resnet50(weights=None).state_dict(), weights)
    records, root = read_manifest(make_world())
    changes = {"filter": "torchvision", "filter_weights": weights, "device": "cpu"}
    features = extract_features(records[:3], root, make_settings(Path(), **changes).filter)
    assert features.shape == (3, 2048)
    assert np.linalg.norm(features, axis=1) == pytest.approx(1.0, abs=1e-5)
    torch.save({"layer": torch.zeros(1)}, weights)
    with pytest.raises(DataError, match="no state_dict of torchvision's ResNet-50"):
        extract_features(records[:3], root, make_settings(Path(), **changes).filter)
