"""The layouts of the text-to-image sets: one JSON list of described images, under the published names and fields."""

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ...records import Split
from .msmt17 import list_shots
from .studio import Layout, Studio


SPLITS: dict[str, Split] = {"train": "train", "val": "val", "test": "gallery"}
CUHK_FOLDERS = ("cam_a", "cam_b", "CUHK01", "CUHK03", "Market", "test_query", "train_query")


@dataclass(frozen=True, slots=True)
class _Shot:
    """One image of a plan: whose it is, where it lies below the image folder, and which camera the name tells.

    ``looks`` is the person whom the studio photographs, if that is not the next of its world.
    """

    split: str
    person: int
    camera: int
    index: int
    path: str
    camera_id: str | None = None
    looks: int | None = None


def write_cuhkpedes(root: Path, seed: int = 0) -> Layout:
    """Write ``reid_raw.json`` and ``imgs``; one record has an empty caption besides."""
    people = {1: "train", 2: "train", 3: "train", 4: "val", 5: "test", 6: "test"}
    shots: list[_Shot] = []
    for (person, split), index in product(people.items(), range(2)):
        folder = CUHK_FOLDERS[(2 * person + index) % len(CUHK_FOLDERS)]
        shots.append(_Shot(split, person, index + 1, index, f"{folder}/{person:04d}_{index:03d}.jpg"))
    return _write_described(root, Studio("cuhkpedes", seed), shots, "reid_raw.json", "file_path", empty_captions=1)


def write_icfgpedes(root: Path, seed: int = 0) -> Layout:
    """Write ``ICFG-PEDES.json`` and ``imgs``: images of MSMT17 under its names, two of four test people for training.

    The folders are MSMT17's halves, which say nothing about ICFG-PEDES's own splits; one caption for each image.
    """
    plan = {("test", 0): (0, "train"), ("train", 1): (1, "train"), ("test", 1): (2, "test"), ("train", 2): (3, "test")}
    shots: list[_Shot] = []
    for published in list_shots():
        folder = "test" if published.split in ("query", "gallery") else "train"
        person, split = plan.get((folder, published.person), (None, ""))
        if person is not None:
            path, camera = f"{folder}/{published.name}", f"{published.camera:02d}"
            shots.append(_Shot(split, person, published.camera, published.index, path, camera, published.looks))
    studio = Studio("icfgpedes", seed, world="msmt17")
    return _write_described(root, studio, shots, "ICFG-PEDES.json", "file_path", captions=1)


def write_rstpreid(root: Path, seed: int = 0) -> Layout:
    """Write ``data_captions.json`` and ``imgs``: five images of each identity, by five cameras, two captions each."""
    people = {0: "train", 1: "train", 2: "val", 3: "test", 4: "test"}
    shots = [
        _Shot(split, person, camera, 0, f"{person:04d}_c{camera}_{30 + camera:04d}.jpg", str(camera))
        for (person, split), camera in product(people.items(), (1, 5, 7, 11, 14))
    ]
    return _write_described(root, Studio("rstpreid", seed), shots, "data_captions.json", "img_path")


def write_ufine6926(root: Path, seed: int = 0) -> Layout:
    """Write a JSON list and ``images``."""
    people = {1: "train", 2: "train", 3: "test"}
    shots = [
        _Shot(split, person, 1 + index, index, f"images/{3 * (person - 1) + index + 1}.jpg")
        for (person, split), index in product(people.items(), range(3))
    ]
    return _write_described(root, Studio("ufine6926", seed), shots, "annotations.json", "file_path", prefix="")


def _write_described(
    root: Path,
    studio: Studio,
    shots: list[_Shot],
    file: str,
    path_key: str,
    *,
    prefix: str = "imgs/",
    captions: int = 2,
    empty_captions: int = 0,
) -> Layout:
    layout = Layout(root)
    records: list[dict[str, Any]] = []
    for shot in shots:
        image, described = studio.photograph(shot.looks or shot.person + 1, shot.camera, shot.index)
        path = prefix + shot.path
        studio.add(
            layout,
            image,
            path,
            split=SPLITS[shot.split],
            person=str(shot.person),
            camera=shot.camera_id or path,
            captions=described[:captions],
        )
        # The published lists also hold the captions' words.
        words = [caption.lower().split() for caption in described[:captions]]
        record = {"split": shot.split, "id": shot.person, path_key: shot.path, "processed_tokens": words}
        records.append(record | {"captions": list(described[:captions])})
    if empty_captions:
        records[0]["captions"] += [" "] * empty_captions
        layout.skipped["empty caption"] = empty_captions
    (root / file).write_text(json.dumps(records), encoding="utf-8")
    return layout
