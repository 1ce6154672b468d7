"""Seconds that the metrics take at benchmark size, against the classic argsort of every query's gallery.

Not a test. Run it alone on the machine: ``python tests/bench/bench_metrics.py``. Only the evaluation is timed, in CPU
seconds of one thread; features and similarities are made beforehand.
"""

import os


os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import numpy.typing as npt  # noqa: E402


sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "golden")]

from make_vectors import Vectors, make_vectors  # noqa: E402

from chatreid_plugin.eval.identity_cmc import Cmc  # noqa: E402
from chatreid_plugin.eval.metrics import evaluate_ranking  # noqa: E402


CHUNK = 1000
CLASSIC_QUERIES = 300
IDENTITY_SIZES: list[tuple[str, Cmc, dict[str, int]]] = [
    ("CUHK03 classic", "single_gallery_shot", {"n_ids": 100, "n_q": 965, "n_pos": 965, "n_cam": 2}),
    ("SYSU-MM01 all, 1 trial", "unique_identity", {"n_ids": 96, "n_q": 3803, "n_pos": 301, "n_cam": 4}),
]
SIZES = {
    "Market-1501": {"n_ids": 750, "n_q": 3368, "n_pos": 13115, "n_dis": 2798, "n_cam": 6},
    "MSMT17": {"n_ids": 3060, "n_q": 11659, "n_pos": 82161, "n_dis": 0, "n_cam": 15},
}


def iterate_chunks(vectors: Vectors, limit: int) -> Iterator[tuple[slice, npt.NDArray[np.float32]]]:
    """Yield which queries and their scores (chunk, G), with noise below one half so that ties are rare."""
    generator = np.random.default_rng(0)
    gallery = vectors.gallery_features.astype(np.float32).T.copy()
    for start in range(0, limit, CHUNK):
        queries = slice(start, min(start + CHUNK, limit))
        scores = vectors.query_features[queries].astype(np.float32) @ gallery
        yield queries, scores + generator.random(scores.shape, dtype=np.float32) / np.float32(2.1)


def evaluate_by_argsort(scores: npt.NDArray[np.float32], labels: tuple[Any, Any, Any, Any]) -> float:
    """Return mAP as the usual evaluators compute it: argsort, drop what is ignored, cumulate (N queries, G items)."""
    query_person, gallery_person, query_camera, gallery_camera = labels
    precisions: list[float] = []
    for query, row in enumerate(scores):
        order = np.argsort(-row)
        same = gallery_person[order] == query_person[query]
        matches = same[~(same & (gallery_camera[order] == query_camera[query]))]
        if matches.any():
            found = np.cumsum(matches)
            precisions.append(float((found / np.arange(1, len(found) + 1))[matches].mean()))
    return float(np.mean(precisions))


def time_identity_cmc() -> None:
    """Print the seconds of the CMC over identities; integer similarities, so some are tied."""
    for name, cmc, size in IDENTITY_SIZES:
        vectors = make_vectors(seed=1, amp=5, n_dis=0, **size)
        scores = vectors.compute_similarities()
        start = time.process_time()
        labels = (vectors.query_person, vectors.gallery_person, vectors.query_camera, vectors.gallery_camera)
        evaluate_ranking(scores, *labels, ignore="same_camera", cmc=cmc)
        print(f"| {name} | {cmc} | {scores.shape[0]:,} x {scores.shape[1]:,} | {time.process_time() - start:.2f} |")


def main() -> None:
    """Print one line per benchmark size."""
    time_identity_cmc()
    print("| size | queries x gallery | evaluate_ranking, s | argsort per query, s | ratio |\n|---|---|---|---|---|")
    for name, size in SIZES.items():
        vectors = make_vectors(seed=1, amp=5, **size)
        ours = classic = 0.0
        for queries, scores in iterate_chunks(vectors, size["n_q"]):
            labels = (vectors.query_person[queries], vectors.gallery_person)
            labels += (vectors.query_camera[queries], vectors.gallery_camera)
            start = time.process_time()
            found = evaluate_ranking(scores, *labels, ignore="same_camera")
            ours += time.process_time() - start
            if queries.start == 0:
                start = time.process_time()
                expected = evaluate_by_argsort(scores[:CLASSIC_QUERIES], labels)
                classic = (time.process_time() - start) / CLASSIC_QUERIES * size["n_q"]
                few = (labels[0][:CLASSIC_QUERIES], labels[1], labels[2][:CLASSIC_QUERIES], labels[3])
                found = evaluate_ranking(scores[:CLASSIC_QUERIES], *few, ignore="same_camera")
                if abs(found.mean_ap - expected) > 1e-5:  # the few ties left fall as the sort pleases
                    raise SystemExit(f"{name}: mAP {found.mean_ap} and {expected} differ.")
        gallery = len(vectors.gallery_person)
        print(f"| {name} | {size['n_q']:,} x {gallery:,} | {ours:.2f} | {classic:.1f} | {classic / ours:.0f} |")


if __name__ == "__main__":
    main()
