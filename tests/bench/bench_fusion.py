"""Measure k-reciprocal re-ranking at Market-1501 size: random features, whole gallery; time and memory."""

import resource
import time

import numpy as np

from chatreid_plugin.eval.fusion import encode, iterate_jaccard_distances


QUERIES, GALLERY, SIZE, PEOPLE = 3368, 15913, 512, 750


def main() -> None:
    """Print the CPU seconds of encoding and of all queries' distances, and the peak of memory."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(PEOPLE, SIZE))
    features = centres[generator.integers(PEOPLE, size=QUERIES + GALLERY)] + generator.normal(
        size=(QUERIES + GALLERY, SIZE)
    )
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    del centres
    before = time.process_time()
    vectors, _ = encode(features, 20, 6)
    encoded = time.process_time()
    for _ in iterate_jaccard_distances(vectors, QUERIES):
        pass
    after = time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    print(
        f"encode {encoded - before:.1f} s, distances {after - encoded:.1f} s, peak {peak:.2f} GB, {vectors.nnz:,} kept"
    )


if __name__ == "__main__":
    main()
