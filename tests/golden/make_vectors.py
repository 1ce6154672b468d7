"""Seeded inputs of the golden metric vectors; the JSON files beside this one hold the numbers they must give.

The numbers come from an independent float64 reference that agrees with the common evaluators. Features are small
integers from ``RandomState``, whose stream is frozen, and similarities are exact integers, so every machine gets the
same ranking. Run as a script, it checks the checksums of every JSON file.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


FOLDER = Path(__file__).parent
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Vectors:
    """Identities, cameras and integer features (N, 64) of queries and gallery; identity 0 is a distractor."""

    query_person: IntArray
    gallery_person: IntArray
    query_camera: IntArray
    gallery_camera: IntArray
    query_features: IntArray
    gallery_features: IntArray

    def compute_similarities(self) -> npt.NDArray[np.float32]:
        """Return the dot products (Q, G): integers below 2**24, so exact in float32."""
        return self.query_features.astype(np.float32) @ self.gallery_features.astype(np.float32).T


def make_vectors(
    seed: int, n_ids: int, n_q: int, n_pos: int, n_dis: int, n_cam: int, amp: int, dimensions: int = 64
) -> Vectors:
    """Draw a benchmark like Market-1501; the order of the draws is part of the recipe."""
    stream = np.random.RandomState(seed)
    centres = stream.randint(-4, 5, size=(n_ids, dimensions))
    query_person = stream.randint(1, n_ids + 1, size=n_q)
    gallery_person = np.append(stream.randint(1, n_ids + 1, size=n_pos), np.zeros(n_dis, dtype=np.int64))
    gallery_person = gallery_person[stream.permutation(n_pos + n_dis)]
    query_camera = stream.randint(0, n_cam, size=n_q)
    gallery_camera = stream.randint(0, n_cam, size=n_pos + n_dis)
    rows_by_identity = np.vstack([np.zeros((1, dimensions), dtype=np.int64), centres])

    def draw_features(persons: IntArray) -> IntArray:
        return rows_by_identity[persons] + stream.randint(-amp, amp + 1, size=(len(persons), dimensions))

    query_features = draw_features(query_person)
    gallery_features = draw_features(gallery_person)
    return Vectors(query_person, gallery_person, query_camera, gallery_camera, query_features, gallery_features)


def rank_by_index(similarities: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the 0-based ranks (Q, G), equal similarities in gallery order."""
    ranks = np.empty(similarities.shape, dtype=np.float32)
    places = np.arange(similarities.shape[1], dtype=np.float32)
    for query, row in enumerate(similarities):
        ranks[query, np.argsort(-row, kind="stable")] = places
    return ranks


def read_golden(name: str) -> dict[str, Any]:
    """Return one JSON file of this folder."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def main() -> None:
    """Check the inputs of every seeded vector against its checksums."""
    for path in sorted(FOLDER.glob("*.json")):
        golden = read_golden(path.stem)
        if "checksums" in golden:
            vectors = make_vectors(**golden["args"])
            sums = {name: int(getattr(vectors, name).sum()) for name in golden["checksums"]}
            print(f"{path.stem}: {'same' if sums == golden['checksums'] else f'DIFFERENT: {sums}'}")


if __name__ == "__main__":
    main()
