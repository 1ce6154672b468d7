"""Who scores: one function makes the scorer that the settings name."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from ...errors import ConfigError
from ...eval_settings import EvalSettings
from ...records import ImageRecord
from ..arrays import ScoreArray
from ..protocols import Protocol as Benchmark
from ..queries import Query
from .simple import FeatureScorer, OracleScorer, RandomScorer, Vectors


# What a score is: a confidence from the model's own logits, one rebuilt from a server's few best log-probabilities, a
# hard answer (a vote), a similarity of features, another program's score, or nothing that a model said. A mode makes
# log-odds, an order or a sum of standardised margins of them (``modes.name_scores``). The report says which.
Confidence = Literal[
    "margins",
    "top_logprobs",
    "answers",
    "similarities",
    "external",
    "none",
    "log_odds",
    "order",
    "standardised",
]


def rank_weakness(confidence: Confidence) -> int:
    """Return how little scores say, from 0: more where they are rebuilt, most where they are hard answers."""
    return {"top_logprobs": 1, "answers": 2}.get(confidence, 0)


class Scorer(Protocol):
    """What every backend offers; higher scores mean more likely the one that is searched for."""

    @property
    def confidence(self) -> Confidence:
        """What its scores are as long as nothing is filled in; margins are ``top_logprobs`` else."""
        ...

    @property
    def filled(self) -> int:
        """How many words or answers so far the model did not give and were filled in; 0 but for servers."""
        ...

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """What its scores depend on beyond the settings, e.g. a hash of the weights; JSON values."""
        ...

    def prepare(
        self, queries: Sequence[Query], gallery: Sequence[ImageRecord], planned: Sequence[ImageRecord] = ()
    ) -> None:
        """Learn of everything that will be scored, before the first pair; encode images once, for instance.

        The queries come in whole blocks of ``queries.QUERY_BLOCK``, in the protocol's order, with those that were
        scored before: what is computed for a block at once has the same bits then in a resumed evaluation. For the
        same reason ``planned`` has all images of the evaluation, whatever is left of it and whoever does the rest.
        """
        ...

    def score_pairs(self, query: Query, candidates: Sequence[ImageRecord], task: str) -> ScoreArray:
        """Return one score a candidate (K,) for the yes/no question ``task`` (``prompts.build_pair_prompt``)."""
        ...

    def choose(self, query: Query, windows: Sequence[Sequence[ImageRecord]], task: str) -> list[ScoreArray]:
        """Return one score a candidate (N,), N <= 26, for each window: one question each (``build_choice_prompt``)."""
        ...


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
