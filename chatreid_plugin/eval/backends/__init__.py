"""Who scores: one function makes the scorer that the settings name; a scorer is a plain callable.

``scorer(query, candidates)`` returns float32 scores (K,), higher meaning more likely the same person. A scorer may
also have ``fingerprint`` (a string that changes with its weights) and ``prepare(records)`` (called once with every
image that will be needed).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from ...config import EvalSettings
from ...errors import ConfigError
from ...records import ImageRecord
from ..protocols import Protocol
from .simple import score_features, score_oracle, score_random


Scorer = Callable[[ImageRecord, Sequence[ImageRecord]], npt.NDArray[np.float32]]


def make_scorer(
    settings: EvalSettings, protocol: Protocol, features: Mapping[str, npt.NDArray[np.float32]] | None = None
) -> Scorer:
    """Return the scorer of ``settings.backend``.

    Args:
        settings: the evaluation.
        protocol: says where the images are.
        features: image id to the filter's vector (D,), for ``backend: features``.

    Raises:
        ConfigError: ``backend: features`` without features.
        UpstreamError: the model cannot be loaded.
    """
    if settings.backend == "random":
        return partial(score_random, seed=settings.seed)
    if settings.backend == "oracle":
        return score_oracle
    if settings.backend == "features":
        if features is None:
            raise ConfigError("backend: features needs features; set filter to colour, npz or torchvision.")
        return partial(score_features, features=features)
    # Imported here: torch and transformers take seconds to load and nothing else needs them.
    from .transformers import TransformersScorer

    return TransformersScorer(settings, protocol.image_root)
