"""Images that ask for captions: IRRA's i2t is its similarity matrix transposed, and so is ours, with every scorer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from chatreid_plugin.eval import report
from chatreid_plugin.eval.loader import load_benchmark
from chatreid_plugin.eval.metrics import RankingMetrics, evaluate_ranking
from chatreid_plugin.eval.run import run_evaluation
from chatreid_plugin.eval.settings import EvalSettings
from tests.support import alter


MakeSettings = Callable[..., EvalSettings]


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no CMC curves, which take longer than the runs."""
    monkeypatch.setattr(report, "draw_curves", lambda _: "")


@pytest.fixture
def make_text_settings(parse_layout: Callable[[str], Path], make_settings: MakeSettings) -> MakeSettings:
    """Return a function that makes settings for a small CUHK-PEDES, by default image to text."""

    def make(**changes: Any) -> EvalSettings:
        values = {"protocol": "cuhkpedes", "setting": "image_to_text", "report_queries": 2}
        return make_settings(parse_layout("cuhkpedes"), **values | changes)

    return make


@pytest.fixture
def features(make_text_settings: MakeSettings, tmp_path: Path) -> Path:
    """Write features of all images, called by their paths, and captions."""
    benchmark = load_benchmark(make_text_settings().data)
    names = [query.label for query in benchmark.queries]
    names += [f"{record.path}#{record.image_id.rpartition('#')[2]}" for record in benchmark.gallery]
    np.savez(tmp_path / "f.npz", paths=names, features=np.random.default_rng(0).normal(size=(len(names), 8)))
    return tmp_path / "f.npz"


def measure_transposed(settings: EvalSettings, scores: Any) -> RankingMetrics:
    """Measure scores (captions, images) as IRRA does: rows and columns exchanged, the same person matches."""
    asked = load_benchmark(alter(settings, {"setting": "text_to_image"}).data)
    captions = [query.person_id for query in asked.queries]
    return evaluate_ranking(np.asarray(scores).T, [record.person_id for record in asked.gallery], captions)


def read_scores(file: Path) -> Any:
    return np.load(file)["scores"]


@pytest.mark.parametrize("filtered", [False, True])
def test_ranks_the_transposed_matrix(
    make_text_settings: MakeSettings, features: Path, tmp_path: Path, filtered: bool
) -> None:
    own = {"filter": "npz", "filter_features": features} if filtered else {"features": features}
    matrix = {"top_k": None, "save_matrix": tmp_path / "s.npz"}
    asked = make_text_settings(backend="features", setting="text_to_image", **own, **matrix)
    run_evaluation(asked)
    expected = measure_transposed(asked, read_scores(tmp_path / "s.npz"))
    results = run_evaluation(make_text_settings(backend="features", **own, **matrix, overwrite=filtered))
    for found in (results.ranking, results.strict):
        assert found.mean_ap == pytest.approx(expected.mean_ap, abs=1e-12) and 0 < found.mean_ap < 1
        assert found.cmc[1] == expected.cmc[1] and found.mean_inp == pytest.approx(expected.mean_inp, abs=1e-12)
    assert "every image asks, captions are ranked" in results.benchmark.variant
    again = run_evaluation(make_text_settings(backend="scores", scores=tmp_path / "s.npz", output_dir=tmp_path / "b"))
    assert again.ranking.mean_ap == results.ranking.mean_ap
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert results.benchmark.gallery[0].captions[0] in page or results.benchmark.gallery[1].captions[0] in page


def test_each_image_keeps_captions_of_its_own_and_gets_their_scores(
    make_text_settings: MakeSettings, features: Path, tmp_path: Path
) -> None:
    own: dict[str, Any] = {"filter": "npz", "filter_features": features, "floor": 0}
    whole = make_text_settings(backend="features", top_k=None, save_matrix=tmp_path / "all.npz", **own)
    run_evaluation(whole)
    few = run_evaluation(make_text_settings(backend="features", top_k=3, save_matrix=tmp_path / "few.npz", **own))
    scores, kept = read_scores(tmp_path / "all.npz"), read_scores(tmp_path / "few.npz")
    assert (~np.isnan(kept)).sum(axis=1).tolist() == [3] * len(kept)
    np.testing.assert_allclose(kept[~np.isnan(kept)], scores[~np.isnan(kept)], atol=1e-6)
    assert (np.nanmin(kept, axis=1) + 1e-6 >= np.sort(scores, axis=1)[:, -3]).all()
    assert few.pairs == 3 * len(few.benchmark.queries)
    perfect = run_evaluation(make_text_settings(backend="oracle", top_k=3, **own))
    assert perfect.ranking.mean_ap == pytest.approx(perfect.ceiling.mean_ap)
    assert run_evaluation(make_text_settings(backend="random", top_k=3, fusion="linear", **own)).ranking.mean_ap > 0


@pytest.mark.slow
def test_the_model_is_asked_once_for_both_directions(
    make_text_settings: MakeSettings, checkpoint: Path, tmp_path: Path
) -> None:
    model = {"backend": "transformers", "model_name_or_path": str(checkpoint), "device": "cpu", "dtype": "float32"}
    asked = make_text_settings(setting="text_to_image", save_matrix=tmp_path / "s.npz", **model)
    run_evaluation(asked)
    expected = measure_transposed(asked, read_scores(tmp_path / "s.npz"))
    results = run_evaluation(make_text_settings(saved_scores=True, **model))
    assert results.ranking.mean_ap == pytest.approx(expected.mean_ap, abs=1e-12)
    assert results.confidence == "margins"
    row = pq.read_table(tmp_path / "out" / "rankings.parquet").to_pylist()[0]
    assert all("#" in name for name in row["gallery_ids"]) and "#" not in row["query_id"]


def test_captions_are_no_choice_among_images(make_text_settings: MakeSettings) -> None:
    with pytest.raises(ValueError, match="image_to_text ranks captions, and scoring.mode: turns shows images"):
        make_text_settings(mode="turns")
    with pytest.raises(ValueError, match="setting: image_to_text does not fit benchmark market1501"):
        make_text_settings(protocol="market1501")
