"""MSMT17's layouts: two versions with list files, and the Market-style repack; train and test count from person 0."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

from ...records import Split
from .renderer import Layout, Renderer


TRAIN_PEOPLE, TEST_PEOPLE, CAMERAS, IMAGES = 3, 3, (1, 4, 15), 2
# Version -> the folder it unpacks to, of training images, of test images.
FOLDERS = {"v1": ("MSMT17_V1", "train", "test"), "v2": ("MSMT17_V2", "mask_train_v2", "mask_test_v2")}
# People that only the renderer knows by these numbers, apart from the training people.
_TEST_LOOKS = 100


@dataclass(frozen=True, slots=True)
class Shot:
    """One image: its split, the published person, what the renderer shows, and the number in its name."""

    split: Split
    person: int
    looks: int
    camera: int
    index: int
    number: int

    @property
    def name(self) -> str:
        """The published name, below the folder of its half of the data set."""
        ending = "_ex" if self.index else ""
        name = f"{self.person:04d}_{self.number:03d}_{self.camera:02d}_0303morning_{self.index + 8:04d}_0{ending}.jpg"
        return f"{self.person:04d}/{name}"


def list_shots() -> list[Shot]:
    """Return all images, training and validation people first."""
    shots: list[Shot] = []
    for person, camera, index in product(range(TRAIN_PEOPLE), CAMERAS, range(IMAGES)):
        split: Split = "val" if index and camera == CAMERAS[0] else "train"
        shots.append(Shot(split, person, person + 1, camera, index, len(shots)))
    for person, camera, index in product(range(TEST_PEOPLE), CAMERAS, range(IMAGES)):
        split = "gallery" if index else "query"
        shots.append(Shot(split, person, person + _TEST_LOOKS, camera, index, len(shots)))
    return shots


def write_msmt17_v1(root: Path, seed: int = 0) -> Layout:
    """Write ``MSMT17_V1/{train,test}`` and the four lists: 3 + 3 identities, 3 cameras."""
    return _write_version(root, seed, "v1")


def write_msmt17_v2(root: Path, seed: int = 0) -> Layout:
    """Write ``MSMT17_V2/{mask_train_v2,mask_test_v2}`` and the four lists, as zipped on a Mac."""
    layout = _write_version(root, seed, "v2")
    for leftover in ("__MACOSX/MSMT17_V2/._list_train.txt", "MSMT17_V2/mask_train_v2/0000/._0000.jpg"):
        path = root / leftover
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"Mac OS X")
    return layout


def _write_version(root: Path, seed: int, version: str) -> Layout:
    top, train_folder, test_folder = FOLDERS[version]
    layout, renderer = Layout(root / top), Renderer("msmt17", seed)
    lists: dict[str, list[str]] = {name: [] for name in ("train", "val", "query", "gallery")}
    for shot in list_shots():
        tested = shot.split in ("query", "gallery")
        lists[shot.split].append(f"{shot.name} {shot.person}\n")
        image, _ = renderer.render(shot.looks, shot.camera, shot.index)
        path = f"{test_folder if tested else train_folder}/{shot.name}"
        label = f"test_{shot.person:04d}" if tested else f"{shot.person:04d}"
        renderer.add(layout, image, path, split=shot.split, person=label, camera=f"{shot.camera:02d}")
    for name, lines in lists.items():
        (layout.root / f"list_{name}.txt").write_text("".join(lines), encoding="utf-8")
    return layout


def write_msmt17_market(root: Path, seed: int = 0) -> Layout:
    """Write ``bounding_box_train``, ``query`` and ``bounding_box_test``: val is part of train, as in the repacks."""
    layout, renderer = Layout(root), Renderer("msmt17", seed)
    for shot in list_shots():
        image, _ = renderer.render(shot.looks, shot.camera, shot.index)
        name, camera = f"{shot.person:04d}_c{shot.camera}_{shot.number:04d}.jpg", str(shot.camera)
        if shot.split in ("train", "val"):
            path, label = f"bounding_box_train/{name}", f"{shot.person:04d}"
            renderer.add(layout, image, path, split="train", person=label, camera=camera)
        else:
            path = f"{'query' if shot.split == 'query' else 'bounding_box_test'}/{name}"
            renderer.add(layout, image, path, split=shot.split, person=f"test_{shot.person:04d}", camera=camera)
    return layout


LAYOUTS = {
    "msmt17:v1": write_msmt17_v1,
    "msmt17:v2": write_msmt17_v2,
    "msmt17:market": write_msmt17_market,
}
