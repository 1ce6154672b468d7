"""Tests of chatreid_plugin.eval.backends: scorers without a model, for which no model library is loaded."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from chatreid_plugin.datasets.benchmark import Benchmark
from chatreid_plugin.errors import ConfigError
from chatreid_plugin.eval.backends import Models, make_scorer
from chatreid_plugin.eval.loader import load_benchmark
from chatreid_plugin.eval.questions import IMAGE_PAIR
from chatreid_plugin.eval.settings import EvalSettings, ModelSettings


MakeWorld = Callable[..., Path]
MakeSettings = Callable[..., EvalSettings]


@pytest.fixture
def benchmark(make_world: MakeWorld, make_settings: MakeSettings) -> Benchmark:
    return load_benchmark(make_settings(make_world()).data)


def test_oracle_knows_the_person(benchmark: Benchmark, make_settings: MakeSettings) -> None:
    scores = make_scorer(make_settings(Path()), benchmark).score_pairs(
        benchmark.queries[1], benchmark.gallery, IMAGE_PAIR
    )
    assert scores.dtype == np.float32
    assert scores.tolist() == [0.0] * 3 + [1.0] * 3 + [0.0] * 6


def test_random_depends_on_query_and_seed_alone(benchmark: Benchmark, make_settings: MakeSettings) -> None:
    scorer = make_scorer(make_settings(Path(), backend="random", seed=3), benchmark)
    first = scorer.score_pairs(benchmark.queries[0], benchmark.gallery, IMAGE_PAIR)
    assert first.dtype == np.float32
    assert np.array_equal(first, scorer.score_pairs(benchmark.queries[0], benchmark.gallery, IMAGE_PAIR))
    assert not np.array_equal(first, scorer.score_pairs(benchmark.queries[1], benchmark.gallery, IMAGE_PAIR))
    other = make_scorer(make_settings(Path(), backend="random", seed=4), benchmark)
    assert not np.array_equal(first, other.score_pairs(benchmark.queries[0], benchmark.gallery, IMAGE_PAIR))


def test_features_scores_are_dot_products(benchmark: Benchmark, make_settings: MakeSettings) -> None:
    vectors = np.random.default_rng(0).normal(size=(4 + len(benchmark.gallery), 5)).astype(np.float32)
    queries = dict(zip([query.query_id for query in benchmark.queries], vectors[:4], strict=True))
    gallery = dict(zip([record.image_id for record in benchmark.gallery], vectors[4:], strict=True))
    settings = make_settings(Path(), backend="features", filter="colour")
    scorer = make_scorer(settings, benchmark, (queries, gallery))
    assert scorer.score_pairs(benchmark.queries[2], benchmark.gallery, IMAGE_PAIR) == pytest.approx(
        vectors[4:] @ vectors[2], abs=1e-6
    )
    assert scorer.score_pairs(benchmark.queries[2], [], IMAGE_PAIR).shape == (0,)
    with pytest.raises(ConfigError, match="needs the filter.s, so filter.source must not be none"):
        make_scorer(settings, benchmark)


def test_features_scores_tie_when_features_are_equal(benchmark: Benchmark, make_settings: MakeSettings) -> None:
    vectors = np.random.default_rng(0).normal(size=(5, 337)).astype(np.float32)
    queries = {query.query_id: vector for query, vector in zip(benchmark.queries, vectors, strict=False)}
    gallery = {record.image_id: vectors[4] for record in benchmark.gallery}
    scorer = make_scorer(make_settings(Path(), backend="features", filter="colour"), benchmark, (queries, gallery))
    for query in benchmark.queries:
        for count in range(1, 62):
            candidates = (benchmark.gallery * 6)[:count]
            assert len(set(scorer.score_pairs(query, candidates, IMAGE_PAIR).tolist())) == 1


def test_a_checkpoint_is_loaded_when_asked_for_and_kept_for_the_next_evaluation(
    benchmark: Benchmark, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str | None] = []
    made: list[tuple[Path, str, object]] = []

    def load_checkpoint(settings: ModelSettings) -> str:
        loaded.append(settings.model_name_or_path)
        return f"loaded {settings.model_name_or_path}"

    class TransformersScorer:
        def __init__(self, settings: ModelSettings, image_root: Path, image_order: str, checkpoint: object) -> None:
            made.append((image_root, image_order, checkpoint))

    for name, content in (("checkpoint", load_checkpoint), ("transformers", TransformersScorer)):
        module = ModuleType(f"chatreid_plugin.eval.backends.{name}")
        setattr(module, content.__name__, content)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    models = Models()
    for name, order in (("m", "query_first"), ("m", "both"), ("n", "both"), ("m", "both")):
        settings = make_settings(Path(), backend="transformers", model_name_or_path=name, image_order=order)
        assert isinstance(make_scorer(settings, benchmark, models=models), TransformersScorer)
    root = benchmark.image_root
    assert loaded == ["m", "n", "m"]
    assert made[:2] == [(root, "query_first", "loaded m"), (root, "both", "loaded m")]


def test_importing_the_evaluator_loads_no_model_library() -> None:
    code = (
        "import sys, chatreid_plugin.eval.run\n"
        "heavy = {'torch', 'transformers', 'torchvision', 'chatreid_plugin.engine', 'chatreid_plugin.training'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    # The plugin's own start-up hook is switched off, so that only the evaluator's imports are seen.
    environment = {"CHATREID_PLUGIN": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
