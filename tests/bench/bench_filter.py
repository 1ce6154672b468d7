"""Measure the filter at MSMT17's gallery size against sorting whole rows; random features of some of the queries."""

import time

import numpy as np

from chatreid_plugin.eval.filter import filter_gallery, iterate_similarities


QUERIES, GALLERY, SIZE, TOP_K = 512, 82161, 256, 100
ALL_QUERIES = 11659


def main() -> None:
    """Print CPU seconds for MSMT17's 11,659 queries, extrapolated: similarities alone, the filter, sorted rows."""
    generator = np.random.default_rng(0)
    features = generator.normal(size=(QUERIES + GALLERY, SIZE)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    queries, gallery = features[:QUERIES], features[QUERIES:]
    nothing = np.zeros(GALLERY, dtype=np.bool_)
    times = [time.process_time()]
    for _ in iterate_similarities(queries, gallery):
        pass
    times.append(time.process_time())
    kept = filter_gallery(queries, gallery, lambda query: nothing, -1.0, TOP_K, 20)
    times.append(time.process_time())
    slow = [np.argsort(-row, kind="stable")[:TOP_K] for row in iterate_similarities(queries, gallery)]
    times.append(time.process_time())
    assert all(np.array_equal(one, other) for one, other in zip(kept, slow, strict=True))
    similarities, filtered, sorting = np.diff(times) * ALL_QUERIES / QUERIES
    print(f"similarities {similarities:.1f} s, filter {filtered:.1f} s, sorting whole rows {sorting:.1f} s")


if __name__ == "__main__":
    main()
