"""Tests of chatreid_plugin.eval.external: other models' scores and features, under any protocol."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from chatreid_plugin.errors import DataError
from chatreid_plugin.eval.external import list_image_names, list_query_names
from chatreid_plugin.eval.pipeline import run_evaluation
from chatreid_plugin.eval.protocols import Protocol, load_protocol
from chatreid_plugin.eval_settings import EvalSettings
from chatreid_plugin.shards import read_manifest, read_manifest_provenance, write_manifest


MakeWorld = Callable[..., Path]
MakeSettings = Callable[..., EvalSettings]


def write_scores(path: Path, protocol: Protocol, *, mapped: bool = False) -> None:
    """Write perfect scores, the gallery shuffled and one image more than asked for."""
    gallery = [list_image_names(record)[0] for record in protocol.gallery] + ["extra.png"]
    persons = [record.person_id for record in protocol.gallery] + ["nobody"]
    scores = np.array([[query.person_id == person for person in persons] for query in protocol.queries], np.float32)
    order = np.random.default_rng(0).permutation(len(gallery))
    queries = [list_query_names(query)[0] for query in protocol.queries]
    names = {"queries": np.array(queries), "gallery": np.array(gallery)[order]}
    if mapped:
        np.save(path.with_suffix(".npy"), scores[:, order])
        np.savez(path, **names)
    else:
        np.savez(path, scores=scores[:, order], **names)


@pytest.mark.parametrize("mapped", [False, True])
def test_scores_are_found_by_name(
    make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path, mapped: bool
) -> None:
    manifest = make_world()
    write_scores(tmp_path / "s.npz", load_protocol(make_settings(manifest)), mapped=mapped)
    file = tmp_path / ("s.npy" if mapped else "s.npz")
    results = run_evaluation(make_settings(manifest, backend="scores", scores=file, filter="colour"))
    ranking = results.ranking
    assert results.settings.filter == "none"
    assert ranking.mean_ap == ranking.cmc[1] == results.ceiling.mean_ap == results.strict.mean_ap == 1.0
    assert results.pairs == 4 * 12
    assert (tmp_path / "out" / "report.html").is_file()


def test_captions_are_called_by_path_and_number(
    make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path
) -> None:
    from dataclasses import replace

    manifest = make_world()
    records, root = read_manifest(manifest)
    described = [replace(record, captions=("a man", "in red")) for record in records]
    write_manifest(manifest, described, root, read_manifest_provenance(manifest) | {"image_root": "../images"})
    protocol = load_protocol(make_settings(manifest, protocol="cuhkpedes"))
    assert list_query_names(protocol.queries[1])[0].endswith(".png#1")
    write_scores(tmp_path / "s.npz", protocol)
    settings = make_settings(manifest, protocol="cuhkpedes", backend="scores", scores=tmp_path / "s.npz")
    assert run_evaluation(settings).ranking.mean_ap == 1.0


def test_features_rank_without_image_files(
    make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = make_world(images=False)
    records, _ = read_manifest(manifest)
    people = sorted({record.person_id for record in records})
    features = 3.0 * np.eye(len(people))[[people.index(record.person_id) for record in records]]
    sides = {"query": [], "gallery": []}
    for record, feature in zip(records, features, strict=True):
        sides[record.split].append((record.path, feature))
    arrays = {f"{side}_paths": np.array([path for path, _ in items]) for side, items in sides.items()}
    arrays |= {f"{side}_features": np.stack([feature for _, feature in items]) for side, items in sides.items()}
    for number, content in enumerate((arrays, {"paths": [r.path for r in records], "features": features})):
        np.savez(tmp_path / f"{number}.npz", **content)
        settings = make_settings(manifest, backend="features", features=tmp_path / f"{number}.npz")
        assert run_evaluation(settings).ranking.mean_ap == 1.0
    assert "only the pictures of the report will be missing" in caplog.text


def test_names_what_a_file_lacks(make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path) -> None:
    manifest = make_world()
    file = tmp_path / "s.npz"
    settings = make_settings(manifest, backend="scores", scores=file)
    with pytest.raises(DataError, match="no readable .npz"):
        run_evaluation(settings)
    np.savez(file, scores=np.zeros((1, 2)))
    with pytest.raises(DataError, match="lacks the array"):
        run_evaluation(settings)
    np.savez(file, scores=np.zeros((1, 2)), queries=["a", "b"], gallery=["c", "d"])
    with pytest.raises(DataError, match="must be"):
        run_evaluation(settings)
    np.savez(file, scores=np.zeros((2, 2)), queries=["a", "b"], gallery=["c", "d"])
    with pytest.raises(DataError, match="lacks the scores of 4 image"):
        run_evaluation(settings)


def test_refuses_a_file_without_its_backend(make_world: MakeWorld, make_settings: MakeSettings) -> None:
    with pytest.raises(ValueError, match="scores is for backend: scores"):
        make_settings(make_world(), scores="s.npz")
    with pytest.raises(ValueError, match="backend: scores needs scores"):
        make_settings(make_world(), backend="scores")
    with pytest.raises(ValueError, match="are not filtered"):
        make_settings(make_world(), backend="scores", scores="s.npz", filter="colour", fusion="linear")
