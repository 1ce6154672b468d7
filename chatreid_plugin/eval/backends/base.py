"""What every backend offers: a scorer, and what its scores are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ...archives import ScoreArray
from ...datasets.benchmark import Query
from ...records import ImageRecord


# Queries of which a model may compute something at once.
QUERY_BLOCK = 32
# What a score is: a confidence from the model's own logits, one rebuilt from a server's few best log-probabilities, a
# hard answer (a vote), a similarity of features, another program's score, or nothing that a model said. A mode makes
# log-odds, an order or a sum of standardised margins of them (``questions.name_scores``). The report says which.
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


@dataclass(frozen=True, slots=True)
class StoredFeature:
    """What a vision tower makes of one image, as bytes to keep on disk.

    Attributes:
        grid: patches in time, height and width.
        shape: of the numbers.
        content: the numbers, in the model's dtype.
    """

    grid: tuple[int, int, int]
    shape: tuple[int, ...]
    content: bytes


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

        The queries come in whole blocks of ``QUERY_BLOCK``, in the benchmark's order, with those that were
        scored before: what is computed for a block at once has the same bits then in a resumed evaluation. For the
        same reason ``planned`` has all images of the evaluation, whatever is left of it and whoever does the rest.
        """
        ...

    def score_pairs(self, query: Query, candidates: Sequence[ImageRecord], task: str) -> ScoreArray:
        """Return one score a candidate (K,) for the yes/no question ``task`` (``questions.build_pair_prompt``)."""
        ...

    def choose(self, query: Query, windows: Sequence[Sequence[ImageRecord]], task: str) -> list[ScoreArray]:
        """Return one score a candidate (N,), N <= 26, for each window: one question each (``build_choice_prompt``)."""
        ...
