"""Seconds and memory that the metrics take at benchmark size, against the classic argsort of every query's gallery.

Not a test. Run it alone on the machine: ``python tests/bench/bench_metrics.py [--random | --memory]``. Only the
evaluation is timed, in CPU seconds of one thread; features and similarities are made beforehand. ``--random`` takes
random scores, of which nothing can be left out of the sorting; ``--memory`` measures memory, at MSMT17's size.
"""

import os


os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

import argparse  # noqa: E402
import itertools  # noqa: E402
import resource  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
import tracemalloc  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, get_args  # noqa: E402

import numpy as np  # noqa: E402
import numpy.typing as npt  # noqa: E402


sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "golden")]

from make_vectors import Vectors, make_vectors  # noqa: E402

from chatreid_plugin.eval.metrics import evaluate_ranking  # noqa: E402
from chatreid_plugin.eval.tied import Cmc  # noqa: E402


CHUNK = 1000
CLASSIC_QUERIES = 300
MEMORY_CHUNK = 100
IDENTITY_QUERIES = 20
IDENTITY_SIZES: list[tuple[str, Cmc, dict[str, int]]] = [
    ("CUHK03 classic", "single_gallery_shot", {"n_ids": 100, "n_q": 965, "n_pos": 965, "n_cam": 2}),
    ("SYSU-MM01 all, 1 trial", "unique_identity", {"n_ids": 96, "n_q": 3803, "n_pos": 301, "n_cam": 4}),
]
SIZES = {
    "Market-1501": {"n_ids": 750, "n_q": 3368, "n_pos": 13115, "n_dis": 2798, "n_cam": 6},
    "MSMT17": {"n_ids": 3060, "n_q": 11659, "n_pos": 82161, "n_dis": 0, "n_cam": 15},
}


def iterate_chunks(
    vectors: Vectors, limit: int, chunk: int, *, chance: bool = False
) -> Iterator[tuple[slice, npt.NDArray[np.float32]]]:
    """Yield which queries and their scores (chunk, G), with noise below one half so that ties are rare.

    With ``chance`` the scores are the noise alone. Every chunk lies in the same two arrays, made before the first one.
    """
    generator = np.random.default_rng(0)
    gallery = vectors.gallery_features.astype(np.float32).T.copy()
    features = vectors.query_features.astype(np.float32)
    scores, noise = (np.empty((min(chunk, limit), gallery.shape[1]), dtype=np.float32) for _ in range(2))
    for start in range(0, limit, chunk):
        queries = slice(start, min(start + chunk, limit))
        count = queries.stop - start
        generator.random(out=noise[:count], dtype=np.float32)
        noise[:count] /= np.float32(2.1)
        if not chance:
            np.matmul(features[queries], gallery, out=scores[:count])
            noise[:count] += scores[:count]
        yield queries, noise[:count]


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


def measure_memory() -> None:
    """Print the peak of what the evaluation itself allocates at MSMT17's size, and the process's resident set."""
    vectors = make_vectors(seed=1, amp=5, **SIZES["MSMT17"])
    print("| cmc | queries x gallery | peak, MB |\n|---|---|---|")
    for cmc in get_args(Cmc):
        limit = SIZES["MSMT17"]["n_q"] if cmc == "standard" else IDENTITY_QUERIES
        labels = (vectors.query_person[:limit], vectors.gallery_person)
        labels += (vectors.query_camera[:limit], vectors.gallery_camera)
        rows = (row for _, scores in iterate_chunks(vectors, limit, MEMORY_CHUNK) for row in scores)
        first = next(rows)  # so the arrays of scores are there before allocations are traced
        tracemalloc.start()
        evaluate_ranking(itertools.chain([first], rows), *labels, ignore="same_camera", cmc=cmc)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        print(f"| {cmc} | {limit:,} x {len(vectors.gallery_person):,} | {peak / 1e6:.1f} |")
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes on Linux
    print(f"Resident set of the process at its peak: {resident / 1e3:.0f} MB")


def main() -> None:
    """Print one line per benchmark size."""
    parser = argparse.ArgumentParser()
    options = parser.add_mutually_exclusive_group()
    options.add_argument("--random", action="store_true")
    options.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    if arguments.memory:
        measure_memory()
        return
    if not arguments.random:
        time_identity_cmc()
    print("| size | queries x gallery | evaluate_ranking, s | argsort per query, s | ratio |\n|---|---|---|---|---|")
    for name, size in SIZES.items():
        vectors = make_vectors(seed=1, amp=5, **size)
        ours = classic = 0.0
        for queries, scores in iterate_chunks(vectors, size["n_q"], CHUNK, chance=arguments.random):
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
