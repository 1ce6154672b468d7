"""Tests of chatreid_plugin.eval.run: whole evaluations on a tiny data set, resumed, changed and refused."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from chatreid_plugin import tasks
from chatreid_plugin.datasets.benchmark import Query
from chatreid_plugin.errors import UpstreamError
from chatreid_plugin.eval import run
from chatreid_plugin.eval.batch import describe_plan
from chatreid_plugin.eval.questions import IMAGE_PAIR, TEXT_PAIR
from chatreid_plugin.eval.report import Results, describe_results, render_table
from chatreid_plugin.eval.run import describe_fingerprint, run_evaluation
from chatreid_plugin.eval.settings import EvalSettings
from chatreid_plugin.records import ImageRecord
from chatreid_plugin.shards import read_manifest, write_manifest
from tests.support import alter


MakeWorld = Callable[..., Path]
MakeSettings = Callable[..., EvalSettings]


class CountingScorer:
    """Scores like the oracle, keeps a log, and may be interrupted or give another shape or value."""

    confidence = "margins"
    filled = 0
    fingerprint: ClassVar[dict[str, str]] = {"weights": "weights-1"}

    def __init__(self, stop_after: int | None = None, wrong: float | None = None, extra: int = 0) -> None:
        self.stop_after, self.wrong, self.extra = stop_after, wrong, extra
        self.scored: list[str] = []
        self.prepared: list[list[str]] = []

    def prepare(
        self, queries: Sequence[Query], gallery: Sequence[ImageRecord], planned: Sequence[ImageRecord] = ()
    ) -> None:
        self.prepared.append([*(query.query_id for query in queries), *(record.image_id for record in gallery)])

    def score_pairs(self, query: Query, candidates: Sequence[ImageRecord], task: str) -> npt.NDArray[np.float32]:
        if self.stop_after is not None and len(self.scored) >= self.stop_after:
            raise KeyboardInterrupt
        self.scored.append(query.query_id)
        values = [float(record.person_id == query.person_id) for record in candidates] + [0.0] * self.extra
        return np.array(values if self.wrong is None else [self.wrong, *values[1:]], dtype=np.float32)

    def choose(
        self, query: Query, windows: Sequence[Sequence[ImageRecord]], task: str
    ) -> list[npt.NDArray[np.float32]]:
        return [self.score_pairs(query, window, task) for window in windows]


def use_scorer(monkeypatch: pytest.MonkeyPatch, scorer: CountingScorer) -> CountingScorer:
    def make_scorer(*arguments: object) -> CountingScorer:
        return scorer

    monkeypatch.setattr(run, "make_scorer", make_scorer)
    return scorer


def test_oracle_is_perfect(make_world: MakeWorld, make_settings: MakeSettings) -> None:
    results = run_evaluation(make_settings(make_world()))
    assert results.ranking.mean_ap == results.ranking.cmc[1] == results.ranking.mean_inp == 1.0
    assert results.strict.mean_ap == results.filter_recall == 1.0
    assert results.pairs == 4 * 11
    assert results.baseline is None
    assert results.ranking.tie_rate == 0.0


def test_features_backend_equals_the_baseline(make_world: MakeWorld, make_settings: MakeSettings) -> None:
    results = run_evaluation(make_settings(make_world(), backend="features", filter="colour"))
    assert results.baseline is not None
    assert results.ranking.mean_ap == pytest.approx(results.baseline.mean_ap)
    assert results.ranking.cmc == pytest.approx(results.baseline.cmc)


def test_features_do_not_depend_on_the_order_of_the_gallery_when_all_are_equal(
    make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path
) -> None:
    people = [1] * 9 + [2] * 52
    vector = np.random.default_rng(0).normal(size=337).astype(np.float32)
    found: list[Results] = []
    for number, order in enumerate((people, people[::-1])):
        items = [("query", "1", "1"), ("query", "2", "1"), *(("gallery", str(person), "2") for person in order)]
        manifest = make_world(items, images=False)
        paths = [record.path for record in read_manifest(manifest)[0]]
        np.savez(tmp_path / "f.npz", paths=paths, features=np.tile(vector, (len(paths), 1)))
        changes = {"filter": "npz", "filter_features": tmp_path / "f.npz", "backend": "features", "top_k": None}
        output = tmp_path / str(number)
        for path in paths:
            file = tmp_path / "images" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        found.append(run_evaluation(make_settings(manifest, output_dir=output, report_queries=0, **changes)))
    assert found[0].ranking.mean_ap == pytest.approx(found[1].ranking.mean_ap, abs=1e-12)
    assert found[0].ranking.tie_rate == 1.0
    assert found[0].measured.cut_tie_rate == 0.0


def test_ties_at_the_cut_are_reported(make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path) -> None:
    manifest = make_world()
    paths = [record.path for record in read_manifest(manifest)[0]]
    np.savez(tmp_path / "f.npz", paths=paths, features=np.ones((len(paths), 3)))
    settings = make_settings(manifest, filter="npz", filter_features=tmp_path / "f.npz", top_k=3, floor=0)
    results = run_evaluation(settings)
    assert describe_results(results)["filter"]["cut_tie_rate"] == 1.0
    assert "at the filter's cut 100.00" in render_table(results)


def test_filter_bounds_what_the_oracle_can_reach(make_world: MakeWorld, make_settings: MakeSettings) -> None:
    changes = {"filter": "colour", "top_k": 1, "floor": 0}
    results = run_evaluation(make_settings(make_world(), **changes))
    assert results.pairs == 4
    assert results.filter_recall == 0.5
    assert results.ranking.mean_ap == results.ceiling.mean_ap >= results.strict.mean_ap == 0.5
    assert results.strict.mean_inp == 0.0


def test_random_is_repeatable(make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path) -> None:
    manifest = make_world()
    first = run_evaluation(make_settings(manifest, backend="random", output_dir=tmp_path / "a"))
    second = run_evaluation(make_settings(manifest, backend="random", output_dir=tmp_path / "b"))
    assert first.ranking.mean_ap == second.ranking.mean_ap < 1.0
    assert (tmp_path / "a" / "rankings.parquet").read_bytes() == (tmp_path / "b" / "rankings.parquet").read_bytes()


def test_resumes_after_an_interruption_and_a_torn_line(
    make_world: MakeWorld, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(make_world(), backend="transformers", model_name_or_path="m")
    use_scorer(monkeypatch, CountingScorer(stop_after=3))
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(settings)
    (saved,) = settings.output.output_dir.glob("scores-*.jsonl")
    saved.write_bytes(saved.read_bytes()[:-7])
    assert not (settings.output.output_dir / "results.json").exists()

    scorer = use_scorer(monkeypatch, CountingScorer())
    assert run_evaluation(settings).ranking.mean_ap == 1.0
    assert len(scorer.scored) == 2
    assert len(scorer.prepared) == 1
    assert set(scorer.scored) < set(scorer.prepared[0])  # queries come in whole blocks

    scorer = use_scorer(monkeypatch, CountingScorer())
    assert run_evaluation(settings).ranking.mean_ap == 1.0
    assert scorer.scored == scorer.prepared == []

    scorer = use_scorer(monkeypatch, CountingScorer())
    run_evaluation(alter(settings, {"overwrite": True}))
    assert len(scorer.scored) == 4


def test_prepares_each_needed_image_once(
    make_world: MakeWorld, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = use_scorer(monkeypatch, CountingScorer())
    changes = {"filter": "colour", "top_k": 2, "floor": 0, "backend": "transformers", "model_name_or_path": "m"}
    run_evaluation(make_settings(make_world(), **changes))
    (prepared,) = scorer.prepared
    assert len(prepared) == len(set(prepared)) == 4 + 8


@pytest.mark.parametrize("changes", [{"image_max_pixels": 1000}, {"chatreid_stage": 2}, {"dtype": "float16"}])
def test_scores_anew_when_something_that_matters_changed(
    make_world: MakeWorld, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    settings = make_settings(make_world(), backend="transformers", model_name_or_path="m")
    use_scorer(monkeypatch, CountingScorer())
    run_evaluation(settings)
    scorer = use_scorer(monkeypatch, CountingScorer())
    run_evaluation(alter(settings, changes))
    assert len(scorer.scored) == 4


def test_scores_anew_what_shows_an_image_with_other_pixels(
    make_world: MakeWorld, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = make_settings(make_world(), backend="transformers", model_name_or_path="m")
    use_scorer(monkeypatch, CountingScorer())
    run_evaluation(settings)
    images, copy = tmp_path / "images", tmp_path / "copy"
    shutil.copytree(images, copy)

    def count_scored(folder: Path) -> int:
        scorer = use_scorer(monkeypatch, CountingScorer())
        run_evaluation(alter(settings, {"image_root": folder}))
        return len(scorer.scored)

    assert count_scored(copy) == 0
    first, other, *_ = sorted((copy / "query").iterdir())
    first.write_bytes(other.read_bytes())
    assert count_scored(copy) == 1
    assert count_scored(images) == 0
    sorted((copy / "gallery").iterdir())[0].write_bytes(other.read_bytes())
    assert count_scored(copy) >= 3  # all whose candidate it is


def test_keeps_the_scores_when_the_checkpoint_was_moved(
    make_world: MakeWorld, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(make_world(), backend="transformers", model_name_or_path="m")
    use_scorer(monkeypatch, CountingScorer())
    run_evaluation(settings)
    scorer = use_scorer(monkeypatch, CountingScorer())
    run_evaluation(alter(settings, {"model_name_or_path": "n"}))
    assert scorer.scored == []


def change_wording(patch: pytest.MonkeyPatch, task: str) -> None:
    (first, *others) = tasks.TASKS[task].prompts
    patch.setitem(tasks.TASKS, task, replace(tasks.TASKS[task], prompts=(f"{first} Look closely.", *others)))


@pytest.mark.parametrize(
    ("mode", "change"),
    [
        ("pointwise", lambda patch: change_wording(patch, IMAGE_PAIR)),
        ("pointwise", lambda patch: change_wording(patch, TEXT_PAIR)),
        ("pointwise", lambda patch: patch.setattr(tasks, "YES", "yes")),
        ("pointwise", lambda patch: patch.setattr(tasks, "NO", "no")),
        ("choice", lambda patch: change_wording(patch, "standard_reid")),
        ("turns", lambda patch: change_wording(patch, "standard_reid")),
    ],
    ids=["images", "words", "yes", "no", "choice", "turns"],
)
def test_starts_a_new_file_and_says_so_when_a_prompt_changed(
    make_world: MakeWorld,
    make_settings: MakeSettings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mode: str,
    change: Callable[[pytest.MonkeyPatch], None],
) -> None:
    settings = make_settings(make_world(), backend="transformers", model_name_or_path="m", mode=mode)

    def count_scored() -> int:
        scorer = use_scorer(monkeypatch, CountingScorer())
        run_evaluation(settings)
        return len(scorer.scored)

    assert count_scored() >= 4
    (before,) = settings.output.output_dir.glob("scores-*.jsonl")
    saved = before.read_bytes()
    assert count_scored() == 0
    assert "another model, prompt or setting" not in caplog.text
    with monkeypatch.context() as patch:
        change(patch)
        assert count_scored() >= 4
    assert f"another model, prompt or setting ({before.name})" in caplog.text
    assert before.read_bytes() == saved
    assert len(list(settings.output.output_dir.glob("scores-*.jsonl"))) == 2
    assert count_scored() == 0


def test_oracle_scores_anew_when_a_label_changed(
    make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path
) -> None:
    manifest = make_world()
    records, root = read_manifest(manifest)
    assert run_evaluation(make_settings(manifest)).ranking.mean_ap == 1.0
    first, second = (record.person_id for record in records[:2])
    swapped = {first: second, second: first}
    for split in ("query", "gallery"):
        changed = [
            replace(record, person_id=swapped.get(record.person_id, record.person_id))
            if record.split == split
            else record
            for record in records
        ]
        write_manifest(manifest, changed, root, {"made_by": "test"})
        assert run_evaluation(make_settings(manifest)).ranking.mean_ap == 1.0
    assert len(list((tmp_path / "out").glob("scores-*.jsonl"))) == 3


@pytest.mark.parametrize("source", ["npz", "colour"])
def test_features_backend_scores_anew_when_the_features_changed(
    make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path, source: str
) -> None:
    manifest, file = make_world(), tmp_path / "f.npz"
    paths = [record.path for record in read_manifest(manifest)[0]]
    settings = make_settings(manifest, backend="features", filter=source, filter_features=file)
    rng = np.random.default_rng(0)
    found: list[float] = []
    for _ in range(2):
        np.savez(file, paths=paths, features=rng.normal(size=(len(paths), 8)))
        for path in paths[:4]:
            Image.fromarray(rng.integers(0, 256, (48, 24, 3), dtype=np.uint8)).save(tmp_path / "images" / path)
        found.append(run_evaluation(settings).ranking.mean_ap)
    settings.output.output_dir.rename(tmp_path / "before")
    assert run_evaluation(settings).ranking.mean_ap == found[1]
    assert found[0] != found[1]


def test_fingerprint_has_the_weights_but_not_the_batch_size(make_settings: MakeSettings) -> None:
    settings = make_settings(Path(), backend="transformers", model_name_or_path="m")
    first = describe_fingerprint(settings, CountingScorer())
    assert first["weights"] == "weights-1"
    assert first == describe_fingerprint(alter(settings, {"batch_size": 7}), CountingScorer())


@pytest.mark.parametrize("scorer", [CountingScorer(wrong=float("nan")), CountingScorer(extra=1)])
def test_refuses_scores_that_make_no_sense(
    make_world: MakeWorld, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, scorer: CountingScorer
) -> None:
    use_scorer(monkeypatch, scorer)
    with pytest.raises(UpstreamError, match="The scorer gave"):
        run_evaluation(make_settings(make_world()))


def test_dry_run_counts_and_writes_nothing(make_world: MakeWorld, make_settings: MakeSettings) -> None:
    settings = make_settings(make_world(), filter="colour", top_k=5)
    text = describe_plan(settings)
    assert "4 queries (0 skipped), 12 gallery images, at most 20 pairs" in text
    assert not settings.output.output_dir.exists()


def test_top500_takes_ties_in_gallery_order_and_says_so(make_world: MakeWorld, make_settings: MakeSettings) -> None:
    results = run_evaluation(make_settings(make_world(), average_precision="top500", filter="colour", top_k=3))
    assert results.ranking.mean_ap == 1.0
    content = describe_results(results)
    assert (content["protocol"]["average_precision"], content["protocol"]["ties"]) == ("top500", "index")
    assert "first 500" in content["definitions"]["mAP"]
    assert "gallery order" in content["definitions"]["ties"]


@pytest.mark.parametrize(
    ("key", "value"), [("seed", -1), ("tau", float("nan")), ("tau", 2), ("tau", -1.5), ("average_precision", "best")]
)
def test_refuses_a_value_that_means_nothing(key: str, value: object, make_settings: MakeSettings) -> None:
    with pytest.raises(ValueError, match=key):
        make_settings(Path(), **{key: value})
