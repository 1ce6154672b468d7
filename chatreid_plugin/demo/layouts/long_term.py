"""Celeb-reID, DeepChange, LaST and VC-Clothes: people in two outfits, whose layouts name cameras or do not."""

from itertools import product
from pathlib import Path

from ...records import Split
from .studio import Layout, Studio


TRAIN_PEOPLE, VAL_PEOPLE, TEST_PEOPLE, CAMERAS, OUTFITS = 3, 2, 3, 2, 2


def write_celebreid(root: Path, seed: int = 0) -> Layout:
    """Write Celeb-reID: no cameras, no clothes labels; the test people's numbers start again."""
    return _write_celeb(root / "Celeb-reID", seed)


def write_celebreid_light(root: Path, seed: int = 0) -> Layout:
    """Write Celeb-reID-light, the same layout in another folder."""
    return _write_celeb(root / "Celeb-reID-light", seed)


def _write_celeb(root: Path, seed: int) -> Layout:
    layout, studio = Layout(root), Studio("celebreid", seed)
    for number, outfit, index in product(range(1, TRAIN_PEOPLE + TEST_PEOPLE + 1), range(OUTFITS), range(2)):
        image, _ = studio.photograph(number, outfit + 1, index, outfit=outfit)
        shot = 2 * outfit + index + 1
        trains = number <= TRAIN_PEOPLE
        split: Split = "train" if trains else "query" if shot == 1 else "gallery"
        published = number if trains else number - TRAIN_PEOPLE
        path = f"{split}/{published}_{shot}_0.jpg"
        person = str(published) if trains else f"test_{published}"
        studio.add(layout, image, path, split=split, person=person, camera=path)
    return layout


def write_deepchange(root: Path, seed: int = 0) -> Layout:
    """Write DeepChange: five folders, each with a list of images and tracklets; a tracklet for each outfit."""
    layout, studio = Layout(root), Studio("deepchange", seed)
    lists: dict[str, list[str]] = {
        folder: []
        for folder in ("train-set", "val-set-query", "val-set-gallery", "test-set-query", "test-set-gallery")
    }
    tracklets: dict[str, str] = {}
    people = range(1, TRAIN_PEOPLE + VAL_PEOPLE + TEST_PEOPLE + 1)
    for number, camera, outfit, index in product(people, range(1, CAMERAS + 1), range(OUTFITS), range(2)):
        image, _ = studio.photograph(number, camera, index, outfit=outfit)
        part = "query" if index == 0 else "gallery"
        if number <= TRAIN_PEOPLE:
            folder, split = "train-set", "train"
        elif number <= TRAIN_PEOPLE + VAL_PEOPLE:
            folder, split = f"val-set-{part}", "val"
        else:
            folder, split = f"test-set-{part}", part
        name = f"P{number}_C{camera:02d}_{outfit + 1}_{index:06d}.jpg"
        tracklet = str((number * CAMERAS + camera) * OUTFITS + outfit)
        lists[folder].append(f"{name},{tracklet}")
        path, clothes = f"{folder}/{name}", str(outfit + 1)
        studio.add(layout, image, path, split=split, person=f"P{number}", camera=f"C{camera:02d}", clothes=clothes)
        if split in ("query", "gallery"):
            tracklets[path] = tracklet
    for folder, lines in lists.items():
        (root / f"{folder}-bbox.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    layout.protocol["tracklets"] = tracklets
    return layout


def write_last(root: Path, seed: int = 0) -> Layout:
    """Write LaST: folders of people but for queries; the numbers start again in each set, clothes are for training."""
    layout, studio = Layout(root), Studio("last", seed)
    sets = (("train", TRAIN_PEOPLE), ("val", VAL_PEOPLE), ("test", TEST_PEOPLE))
    number = 0
    for name, people in sets:
        for published in range(1, people + 1):
            number += 1
            for outfit, index in product(range(OUTFITS), range(2)):
                image, _ = studio.photograph(number, outfit + 1, index, outfit=outfit)
                file = f"{published:06d}_s{outfit:06d}_{index:04d}_{outfit + 1}.jpg"
                part = "query" if index == 0 else "gallery"
                split: Split = "train" if name == "train" else "val" if name == "val" else part
                if name == "train":
                    path = f"train/{published:06d}/{file}"
                else:
                    path = f"{name}/query/{file}" if part == "query" else f"{name}/gallery/{published:06d}/{file}"
                person = f"{published:06d}" if name == "train" else f"{name}_{published:06d}"
                clothes = str(outfit + 1) if name == "train" else None
                studio.add(layout, image, path, split=split, person=person, camera=path, clothes=clothes)
    return layout


def write_vcclothes(root: Path, seed: int = 0) -> Layout:
    """Write VC-Clothes: cameras 1 to 3 see the first outfit, camera 4 the second."""
    layout, studio = Layout(root), Studio("vcclothes", seed)
    for number, camera, index in product(range(1, TRAIN_PEOPLE + TEST_PEOPLE + 1), range(1, 5), range(2)):
        outfit = int(camera == 4)
        image, _ = studio.photograph(number, camera, index, outfit=outfit)
        split: Split = "train" if number <= TRAIN_PEOPLE else "query" if index == 0 else "gallery"
        person, clothes = f"{number:03d}", f"{outfit + 1:02d}"
        path = f"{split}/{person}-{camera:02d}-{clothes}-{index + 1:02d}.jpg"
        studio.add(layout, image, path, split=split, person=person, camera=str(camera), clothes=clothes)
    layout.protocol |= {"same_clothes_cameras": ["2", "3"], "cross_clothes_cameras": ["3", "4"]}
    return layout
