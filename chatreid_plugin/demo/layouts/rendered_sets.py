"""PersonX (a numbered folder for each background) and RandPerson (two releases that name files differently)."""

from itertools import product
from pathlib import Path

from ...records import Split
from .studio import Layout, Studio


TRAIN_PEOPLE, TEST_PEOPLE, VIEWS = 3, 2, 3
# PersonX's cameras are its backgrounds, which have these numbers in the file names.
PERSONX_CAMERAS = {"4": 10, "5": 11}


def write_personx(root: Path, seed: int = 0) -> Layout:
    """Write two of PersonX's backgrounds, each with its own training, query and gallery folder."""
    layout, studio = Layout(root / "PersonX_v1"), Studio("personx", seed)
    people = range(1, TRAIN_PEOPLE + TEST_PEOPLE + 1)
    for (background, camera), number, view in product(PERSONX_CAMERAS.items(), people, range(VIEWS)):
        image, _ = studio.photograph(number, camera, view)
        split: Split = "train" if number <= TRAIN_PEOPLE else "query" if view == 0 else "gallery"
        folder = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}[split]
        path = f"{background}/{folder}/{number:04d}_c{camera}s1_{view:02d}.jpg"
        studio.add(layout, image, path, split=split, person=f"{number:04d}", camera=str(camera))
    return layout


def write_randperson_subset(root: Path, seed: int = 0) -> Layout:
    """Write the subset of the paper: one folder, scene before camera."""
    layout, studio = Layout(root), Studio("randperson", seed)
    for number, scene, camera in product(range(TRAIN_PEOPLE), range(2), range(2)):
        image, _ = studio.photograph(number + 1, 2 * scene + camera + 1, 0)
        path = f"randperson_subset/{number:06d}_s{scene:02d}_c{camera:02d}_f{100 * number + camera:06d}.jpg"
        studio.add(layout, image, path, split="train", person=f"{number:06d}", camera=f"s{scene:02d}_c{camera:02d}")
    return layout


def write_randperson_full(root: Path, seed: int = 0) -> Layout:
    """Write folders of scenes with camera before scene, and a folder of frames that the authors left out."""
    layout, studio = Layout(root), Studio("randperson", seed)
    for number, scene, camera in product(range(TRAIN_PEOPLE), range(2), range(2)):
        image, _ = studio.photograph(number + 1, 2 * scene + camera + 1, 1)
        name = f"{number:06d}_c{camera:02d}_s{scene:02d}_f{100 * number + camera:06d}.jpg"
        path = f"images/scene{scene:02d}/camera{camera}_1/{name}"
        studio.add(layout, image, path, split="train", person=f"{number:06d}", camera=f"s{scene:02d}_c{camera:02d}")
    for number in range(TRAIN_PEOPLE):
        image, _ = studio.photograph(number + 1, 1, 2)
        studio.save(image, layout, f"images/scene00/delete_camera0_1/{number:06d}_c00_s00_f000999.jpg")
    layout.skipped["left out by the authors (delete_ folder)"] = TRAIN_PEOPLE
    return layout
