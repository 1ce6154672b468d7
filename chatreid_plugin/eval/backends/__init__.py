"""Who scores: one function makes the scorer that the settings name."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...datasets.benchmark import Benchmark
from ...errors import ConfigError
from ..settings import RankSettings
from .base import Scorer
from .files import FeatureScorer, OracleScorer, RandomScorer, Vectors


if TYPE_CHECKING:
    from .transformers import TransformersScorer


class Models:
    """The checkpoint in memory, for as many evaluations of it as come one after another."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._loaded: Any = None

    def make_scorer(self, settings: RankSettings, image_root: Path) -> "TransformersScorer":
        """Return a scorer that has encoded nothing yet; its checkpoint is loaded unless it is the last one's.

        Raises:
            ConfigError, UpstreamError: see ``load_checkpoint``.
        """
        # Imported here: torch and transformers take seconds to load and nothing else needs them.
        from .checkpoint import load_checkpoint
        from .transformers import TransformersScorer

        model = settings.model
        key = model.model_name_or_path, model.adapter_name_or_path, model.device, model.dtype
        if key != self._key:
            self._key, self._loaded = (), None  # two may not find room
            self._loaded = load_checkpoint(model)
            self._key = key
        return TransformersScorer(model, image_root, settings.scoring.image_order, self._loaded)


def make_scorer(
    settings: RankSettings,
    benchmark: Benchmark,
    features: tuple[Vectors, Vectors] | None = None,
    models: Models | None = None,
) -> Scorer:
    """Return the scorer of ``scoring.backend``.

    Args:
        settings: who scores.
        benchmark: says where the images are.
        features: the filter's of the queries and of the gallery, for ``backend: features``.
        models: has the checkpoint, or gets it.

    Raises:
        ConfigError: ``backend: features`` without features.
        UpstreamError: the model cannot be loaded, or the server does not answer.
    """
    backend = settings.scoring.backend
    if backend == "random":
        return RandomScorer(settings.scoring.seed)
    if backend == "oracle":
        return OracleScorer(benchmark.queries, benchmark.gallery)
    if backend == "features":
        if features is None:
            raise ConfigError("scoring.backend: features needs the filter's, so filter.source must not be none.")
        return FeatureScorer(*features)
    if backend == "http":
        from .http import HttpScorer

        return HttpScorer(settings.server, settings.model, benchmark.image_root)
    return (models or Models()).make_scorer(settings, benchmark.image_root)
