"""Who scores: one function makes the scorer that the settings name."""

from ...datasets.benchmark import Benchmark
from ...errors import ConfigError
from ...eval_settings import EvalSettings
from .base import Scorer
from .simple import FeatureScorer, OracleScorer, RandomScorer, Vectors


def make_scorer(
    settings: EvalSettings, benchmark: Benchmark, features: tuple[Vectors, Vectors] | None = None
) -> Scorer:
    """Return the scorer of ``settings.backend``.

    Args:
        settings: the evaluation.
        benchmark: says where the images are.
        features: the filter's of the queries and of the gallery, for ``backend: features``.

    Raises:
        ConfigError: ``backend: features`` without features.
        UpstreamError: the model cannot be loaded, or the server does not answer.
    """
    if settings.backend == "random":
        return RandomScorer(settings.seed)
    if settings.backend == "oracle":
        return OracleScorer(benchmark.queries, benchmark.gallery)
    if settings.backend == "features":
        if features is None:
            raise ConfigError("backend: features needs the filter's features, so filter must not be none.")
        return FeatureScorer(*features)
    if settings.backend == "http":
        from .http import HttpScorer

        return HttpScorer(settings, benchmark.image_root)
    # Imported here: torch and transformers take seconds to load and nothing else needs them.
    from .transformers import TransformersScorer

    return TransformersScorer(settings, benchmark.image_root)
