"""How the model is asked about a query's candidates: pair by pair; between the filter and the store."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..errors import UpstreamError
from ..eval_settings import EvalSettings
from ..records import ImageRecord
from .backends import Scorer
from .prompts import IMAGE_PAIR, TEXT_PAIR
from .queries import Query


ScoreArray = npt.NDArray[np.float32]


def score_query(settings: EvalSettings, scorer: Scorer, query: Query, candidates: Sequence[ImageRecord]) -> ScoreArray:
    """Return the scores (K,) of a query's candidates in the mode of the settings.

    ``pointwise``: the margin of Yes over No for each candidate (paper section 4.1, response confidence).

    Raises:
        UpstreamError: the scorer gave other than one finite number a candidate.
    """
    task = IMAGE_PAIR if query.image is not None else TEXT_PAIR
    return check_scores(query, candidates, scorer.score_pairs(query, candidates, task))


def check_scores(query: Query, candidates: Sequence[ImageRecord], values: npt.ArrayLike) -> ScoreArray:
    """Return a scorer's values as float32 (K,), refusing a wrong number of them and NaN."""
    scores = np.asarray(values, dtype=np.float32)
    if scores.shape != (len(candidates),):
        raise UpstreamError(
            f"The scorer gave {scores.shape} scores for {len(candidates)} candidates of {query.label}."
        )
    if not np.isfinite(scores).all():
        wrong = candidates[int(np.flatnonzero(~np.isfinite(scores))[0])]
        raise UpstreamError(
            f"The scorer gave a NaN or infinite score for query {query.label} and {wrong.path}. "
            "The checkpoint is damaged, or its dtype overflows: try dtype=float32."
        )
    return scores
