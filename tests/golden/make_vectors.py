"""Seeded inputs of the golden metric vectors; the JSON files beside this one hold the numbers they must give.

The numbers come from an independent float64 reference that agrees with the common evaluators. Features are small
integers from ``RandomState``, whose stream is frozen, and similarities are exact integers, so every machine gets the
same ranking. Run as a script, it checks the checksums of every JSON file.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


FOLDER = Path(__file__).parent
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Vectors:
    """Identities, cameras and integer features (N, 64) of queries and gallery; identity 0 is a distractor.

    Clothes are numbers of outfits, never shared by two identities; empty where the benchmark has none.
    """

    query_person: IntArray
    gallery_person: IntArray
    query_camera: IntArray
    gallery_camera: IntArray
    query_features: IntArray
    gallery_features: IntArray
    query_clothes: IntArray = field(default_factory=lambda: np.empty(0, np.int64))
    gallery_clothes: IntArray = field(default_factory=lambda: np.empty(0, np.int64))

    def compute_similarities(self) -> npt.NDArray[np.float32]:
        """Return the dot products (Q, G): integers below 2**24, so exact in float32."""
        return self.query_features.astype(np.float32) @ self.gallery_features.astype(np.float32).T


def make_vectors(seed: int, **sizes: int) -> Vectors:
    """Draw a benchmark like Market-1501."""
    return _draw_vectors(np.random.RandomState(seed), **sizes)


def _draw_vectors(
    stream: np.random.RandomState, n_ids: int, n_q: int, n_pos: int, n_dis: int, n_cam: int, amp: int
) -> Vectors:
    """Draw what ``make_vectors`` returns; the order of the draws is part of the recipe."""
    dimensions = 64
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


def make_outfit_vectors(seed: int, n_ids: int, n_unchanged: int, max_outfits: int, **sizes: int) -> Vectors:
    """Draw a benchmark like LTCC: ``n_unchanged`` identities have one outfit, the others 1 to ``max_outfits``."""
    stream = np.random.RandomState(seed)
    drawn = _draw_vectors(stream, n_ids, **sizes)
    outfits = stream.randint(1, max_outfits + 1, size=n_ids)
    outfits[stream.permutation(n_ids)[:n_unchanged]] = 1
    first = np.cumsum(outfits) - outfits

    def draw_clothes(persons: IntArray) -> IntArray:
        return first[persons - 1] + stream.randint(0, 1 << 20, size=len(persons)) % outfits[persons - 1]

    query_clothes = draw_clothes(drawn.query_person)
    return replace(drawn, query_clothes=query_clothes, gallery_clothes=draw_clothes(drawn.gallery_person))


def make_single_shot_vectors(**args: int) -> Vectors:
    """Draw a benchmark whose gallery asks itself, as in CUHK03's first protocol."""
    drawn = make_vectors(**args)
    person, camera, features = drawn.gallery_person, drawn.gallery_camera, drawn.gallery_features
    return Vectors(person, person, camera, camera, features, features)


def _add_noise(stream: np.random.RandomState, centres: IntArray, persons: IntArray, amp: int) -> IntArray:
    return centres[persons - 1] + stream.randint(-amp, amp + 1, size=(len(persons), centres.shape[1]))


def make_text_vectors(seed: int, n_ids: int, images: int, extra_captions: int, amp: int) -> Vectors:
    """Draw a benchmark like CUHK-PEDES: every image has two captions, the first few three; no cameras."""
    stream = np.random.RandomState(seed)
    centres = stream.randint(-4, 5, size=(n_ids, 64))
    gallery_person = np.append(np.arange(1, n_ids + 1), stream.randint(1, n_ids + 1, size=images - n_ids))
    query_person = np.append(np.repeat(gallery_person, 2), gallery_person[:extra_captions])
    gallery_features = _add_noise(stream, centres, gallery_person, amp)
    query_features = _add_noise(stream, centres, query_person, amp)
    cameras = np.zeros(len(query_person), np.int64), np.zeros(images, np.int64)
    return Vectors(query_person, gallery_person, *cameras, query_features, gallery_features)


def make_two_sided_vectors(seed: int, n_ids: int, images: int, amp: int) -> Vectors:
    """Draw a benchmark like RegDB: as many visible (query) as thermal images (gallery) of each identity."""
    stream = np.random.RandomState(seed)
    centres = stream.randint(-4, 5, size=(n_ids, 64))
    person = np.repeat(np.arange(1, n_ids + 1), images)
    visible, thermal = (_add_noise(stream, centres, person, amp) for _ in range(2))
    return Vectors(person, person, np.ones_like(person), np.full_like(person, 2), visible, thermal)


def make_camera_shot_vectors(seed: int, n_ids: int, n_q: int, cameras_per_id: int, amp: int) -> Vectors:
    """Draw a benchmark like LLCM: the gallery holds one image of each identity in some of nine cameras."""
    stream = np.random.RandomState(seed)
    centres = stream.randint(-4, 5, size=(n_ids, 64))
    query_person = stream.randint(1, n_ids + 1, size=n_q)
    query_camera = stream.randint(1, 10, size=n_q)
    cameras = [stream.choice(np.arange(1, 10), cameras_per_id, replace=False) for _ in range(n_ids)]
    gallery_person = np.repeat(np.arange(1, n_ids + 1), cameras_per_id)
    query_features = _add_noise(stream, centres, query_person, amp)
    gallery_features = _add_noise(stream, centres, gallery_person, amp)
    labels = (query_person, gallery_person, query_camera, np.concatenate(cameras))
    return Vectors(*labels, query_features, gallery_features)


def make_clothes_vectors(
    seed: int, n_ids: int, n_gallery: int, n_same: int, n_different: int, amps: list[int], trials: int
) -> tuple[dict[str, Vectors], IntArray]:
    """Draw a benchmark like PRCC; return both kinds of queries and each trial's gallery, one image an identity."""
    stream = np.random.RandomState(seed)
    centres = stream.randint(-4, 5, size=(n_ids, 64))
    persons = [stream.randint(1, n_ids + 1, size=size) for size in (n_gallery, n_same, n_different)]
    features = [_add_noise(stream, centres, person, amp) for person, amp in zip(persons, amps, strict=True)]
    images = [np.flatnonzero(persons[0] == person) for person in range(1, n_ids + 1)]
    drawn = [[own[stream.randint(len(own))] for own in images] for _ in range(trials)]
    sides = {
        name: Vectors(
            persons[side],
            persons[0],
            np.full_like(persons[side], side),
            np.zeros_like(persons[0]),
            features[side],
            features[0],
        )
        for side, name in ((1, "same_clothes"), (2, "different_clothes"))
    }
    return sides, np.array(drawn)


MAKERS = {
    "cuhk03_classic_size": make_single_shot_vectors,
    "ltcc_size": make_outfit_vectors,
    "t2i_cuhk_pedes_size": make_text_vectors,
    "regdb_size": make_two_sided_vectors,
    "llcm_like": make_camera_shot_vectors,
}


def make_named(name: str) -> Vectors:
    """Draw the vectors that ``name``'s JSON file describes."""
    return MAKERS.get(name, make_vectors)(**read_golden(name)["args"])


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
            vectors = make_named(path.stem)
            sums = {name: int(getattr(vectors, name).sum()) for name in golden["checksums"]}
            print(f"{path.stem}: {'same' if sums == golden['checksums'] else f'DIFFERENT: {sums}'}")


if __name__ == "__main__":
    main()
