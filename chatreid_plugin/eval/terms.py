"""What every figure of a result means, in words: quoted by ``report`` and ``html``."""

from ..datasets.benchmark import Benchmark


CMC_DEFINITIONS = {
    "standard": "share of valid queries with a match among the first k (standard CMC)",
    "unique_identity": "share of valid queries with a match among the first k identities, each at its best image",
    "single_gallery_shot": "chance of a match among the first k when one image of each identity is drawn",
}
AP_DEFINITIONS = {
    "mean": "mean over the valid queries of the mean precision at their matches",
    "trapezoid": "mean over the valid queries of the trapezoidal average precision (official Market-1501 code)",
    "top500": "mean over the valid queries of the mean precision at their matches among the first 500 images, cut "
    "before ignored ones are removed (Instruct-ReID's code)",
}
TIE_DEFINITIONS = {
    "expected": "exact expectation over random order of equally scored images",
    "index": "equally scored images in gallery order, as the cut at 500 needs",
}
DEFINITIONS = {
    "mINP": "mean over the valid queries of matches / rank of the last match",
    "tie_rate": "share of valid queries in which a match has the same score as a non-match",
    "interval": "2.5 and 97.5 percentiles of mAP over 1,000 seeded resamples of the queries; of several splits each "
    "is resampled within itself, and their unweighted mean is taken",
    "queries": "queries that are ranked; of several splits those of all, as are pairs_scored and skipped_queries",
    "gallery": "images that are ranked in any trial; of several splits the mean",
    "trials": "mAP and Rank-1 of each trial, or of each split",
    "valid_queries": "queries that have a match; of several splits those of all of them",
    "ranking": "candidates by the scorer, then everything the filter left out, in baseline order",
    "strict": "what the filter left out is not retrieved: matches there add nothing to mAP, miss in Rank-k, INP 0",
    "ceiling": "a perfect scorer on the same candidates, the rest in baseline order",
    "baseline": "the filter's own ranking",
    "filter_recall": "mean over queries of the share of their matches that the filter kept",
    "cut_tie_rate": "share of queries of which the filter left out an image as similar as one it kept (gallery order)",
    "filter_recall_at": "the same among the first k of the filter's ranking, equal similarities in gallery order",
}

# What a reader has to know of scores that are not the model's own margins (``backends.Confidence``).
WARNINGS = {
    "top_logprobs": "Scores come from the server's few best log-probabilities: where a word was not among them, "
    "the least likely one returned stands in for it.",
    "answers": "Scores are hard answers, not confidences: the server gives no log-probabilities. Images with the same "
    "share of votes tie, and ties count as the mean over every order.",
}


def define_terms(protocol: Benchmark) -> dict[str, str]:
    """Return what every figure means under this protocol."""
    return {
        "mAP": AP_DEFINITIONS[protocol.average_precision],
        "Rank-k": CMC_DEFINITIONS[protocol.cmc],
        "ties": TIE_DEFINITIONS[protocol.ties],
        **DEFINITIONS,
    }
