"""Tests of chatreid_plugin.eval.backends.files: the scores of a run, written and read again, give the same numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatreid_plugin.errors import ConfigError, DataError
from chatreid_plugin.eval import report
from chatreid_plugin.eval.run import run_evaluation
from chatreid_plugin.eval.settings import EvalSettings
from chatreid_plugin.shards import read_json


MakeWorld = Callable[..., Path]
MakeSettings = Callable[..., EvalSettings]


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no CMC curves, which take longer than the runs."""
    monkeypatch.setattr(report, "draw_curves", lambda _: "")


def read_metrics(settings: EvalSettings) -> dict[str, Any]:
    """Run it and return what ``results.json`` has of metrics."""
    run_evaluation(settings)
    content = read_json(settings.output.output_dir / "results.json")
    own = {key: content[key] for key in ("metrics", "strict", "cmc_curve", "trials")}
    return own | {"ceiling": content["filter"]["ceiling"], "recall": content["filter"]["recall"]}


@pytest.mark.parametrize("name", ["s.npy", "s.npz"])
def test_a_saved_matrix_gives_the_same_numbers(
    make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path, name: str
) -> None:
    manifest, file = make_world(), tmp_path / "new" / name
    whole = make_settings(manifest, backend="random", save_matrix=file)
    first = read_metrics(whole)
    assert 0.0 < first["metrics"]["mAP"] < 1.0
    again = make_settings(manifest, backend="scores", scores=file, output_dir=tmp_path / "again")
    assert read_metrics(again) == first
    names = np.load(file.with_suffix(".npz"))
    scores = np.load(file) if name == "s.npy" else names["scores"]
    # Of each person's three images one is ignored, by the query's own camera.
    assert scores.dtype == np.float32 and scores.shape == (4, 12)
    assert np.isnan(scores).sum(axis=1).tolist() == [1, 1, 1, 1]
    assert names["gallery"][0] == "tiny/gallery/1_c1_4.png" and np.isnan(scores[0, 0])
    content = file.read_bytes()
    run_evaluation(whole)
    assert file.read_bytes() == content
    assert sorted(path.name for path in file.parent.iterdir()) == sorted({name, "s.npz"})


def test_a_filtered_matrix_gives_what_was_scored(
    make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path
) -> None:
    # Persons 1 and 5 look alike, so that the filter loses a match.
    people = [1, 2, 5, 9]
    items = [("query", str(person), "1") for person in people]
    items += [("gallery", str(person), str(camera)) for person in people for camera in (1, 2, 3)]
    manifest, file = make_world(items), tmp_path / "s.npz"
    changes: dict[str, Any] = {"backend": "random", "filter": "colour", "top_k": 3, "floor": 0}
    first = read_metrics(make_settings(manifest, save_matrix=file, **changes))
    assert first["recall"] < 1.0 and first["strict"] != first["metrics"]
    again = make_settings(manifest, backend="scores", scores=file, output_dir=tmp_path / "again")
    second = read_metrics(again)
    assert (second["recall"], second["strict"]) == (first["recall"], first["strict"])
    assert read_json(again.output.output_dir / "results.json")["protocol"]["pairs_scored"] == 4 * 3
    assert "filtered" in (again.output.output_dir / "report.html").read_text(encoding="utf-8")


def test_trials_and_features_are_saved_too(
    parse_layout: Callable[[str], Path], make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path
) -> None:
    for manifest, changes in (
        (parse_layout("llcm"), {"protocol": "llcm", "trials": 3, "backend": "random"}),
        (make_world(), {"backend": "features", "features": tmp_path / "f.npz"}),
    ):
        if "features" in changes:
            source = run_evaluation(make_settings(manifest, filter="colour")).benchmark
            paths = [*(query.query_id for query in source.queries), *(record.image_id for record in source.gallery)]
            features = np.random.default_rng(0).normal(size=(len(paths), 4))
            np.savez(tmp_path / "f.npz", paths=paths, features=features)
        first = read_metrics(make_settings(manifest, save_matrix=tmp_path / "s.npz", **changes))
        own = changes | {"backend": "scores", "scores": tmp_path / "s.npz", "features": None}
        assert read_metrics(make_settings(manifest, output_dir=tmp_path / "again", **own)) == first


def test_refuses_what_cannot_be_saved(
    make_world: MakeWorld, make_settings: MakeSettings, parse_layout: Callable[[str], Path], tmp_path: Path
) -> None:
    manifest = make_world()
    (tmp_path / "file").touch()
    for changes, fault in (
        ({"save_matrix": "s.csv"}, "has to end in .npz"),
        ({"save_matrix": "s.npz", "backend": "scores", "scores": "o.npz"}, "in a file already"),
        ({"save_matrix": "f.npy", "backend": "features", "features": "f.npz"}, "overwrite the features"),
    ):
        with pytest.raises(ValueError, match=fault):
            make_settings(manifest, **changes)
    with pytest.raises(ValueError, match=r"needs \{trial\} in its name"):
        make_settings(tmp_path / "{trial}.parquet", splits=[1, 2], save_matrix="s.npz")
    with pytest.raises(ConfigError, match="save_matrix: the folder"):
        run_evaluation(make_settings(manifest, save_matrix=tmp_path / "file" / "s.npz"))
    fused = {"protocol": "llcm", "filter": "colour", "fusion": "linear", "backend": "random"}
    with pytest.raises(ConfigError, match="each of 10 trials fuses on its own"):
        run_evaluation(make_settings(parse_layout("llcm"), save_matrix=tmp_path / "s.npz", **fused))


def test_nan_is_no_score_only_where_the_file_says_so(
    make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path
) -> None:
    manifest, file = make_world(), tmp_path / "s.npz"
    run_evaluation(make_settings(manifest, backend="random", save_matrix=file))
    arrays = dict(np.load(file))
    del arrays["not_scored"]
    np.savez(file, **arrays)
    with pytest.raises(DataError, match="are NaN or infinite"):
        run_evaluation(make_settings(manifest, backend="scores", scores=file))
    arrays["scores"][0, 5] = np.inf
    np.savez(file, not_scored=np.nan, **arrays)
    with pytest.raises(DataError, match=r"1 score\(s\) of query .* are NaN or infinite"):
        run_evaluation(make_settings(manifest, backend="scores", scores=file))
