"""The layouts of LTCC and PRCC: people who change clothes."""

from itertools import product
from pathlib import Path

from ...records import Split
from .studio import Layout, Studio


# LTCC: (split, person) -> outfits. The last person of train and test never changes clothes.
_LTCC_PEOPLE: dict[tuple[Split, int], int] = {
    ("train", 1): 2,
    ("train", 7): 1,
    ("gallery", 22): 3,
    ("gallery", 31): 2,
    ("gallery", 94): 1,
}
_LTCC_CAMERAS = (1, 9, 12)
_LTCC_FOLDERS: dict[Split, str] = {"train": "train", "query": "query", "gallery": "test"}

_PRCC_TRAIN_PEOPLE, _PRCC_TEST_PEOPLE, _PRCC_IMAGES = (1, 2, 5), (3, 4), 3
_PRCC_CAMERAS = {"A": 1, "B": 2, "C": 3}


def write_ltcc(root: Path, seed: int = 0) -> Layout:
    """Write ``LTCC_ReID/{train,query,test,info}``: 2 + 3 identities in one to three outfits, 3 of 12 cameras."""
    layout, studio = Layout(root / "LTCC_ReID"), Studio("ltcc", seed)
    frame = 1000
    for (home, person), outfits in _LTCC_PEOPLE.items():
        for outfit, camera, index in product(range(outfits), _LTCC_CAMERAS, range(2)):
            split: Split = "query" if home == "gallery" and index == 0 else home
            frame += 37
            image, _ = studio.photograph(person, camera, index, outfit=outfit)
            path = f"{_LTCC_FOLDERS[split]}/{person:03d}_{outfit + 1}_c{camera}_{frame:06d}.png"
            label = f"{person:03d}"
            clothes = f"{label}_{outfit + 1}"
            studio.add(layout, image, path, split=split, person=label, camera=str(camera), clothes=clothes)
    changing = {"train": [1], "test": [22, 31]}
    unchanging = {"train": [7], "test": [94]}
    (layout.root / "info").mkdir()
    for word, lists in (("change", changing), ("unchange", unchanging)):
        for part, people in lists.items():
            text = "".join(f"{person}\n" for person in people)
            (layout.root / "info" / f"cloth-{word}_id_{part}.txt").write_text(text, encoding="utf-8")
    layout.protocol = {"cloth_change_train_people": ["001"], "cloth_change_test_people": ["022", "031"]}
    return layout


def write_prcc(root: Path, seed: int = 0) -> Layout:
    """Write ``prcc/rgb/{train,val,test}`` and a sketch: 3 + 2 identities; camera C sees them in another outfit."""
    layout, studio = Layout(root / "prcc"), Studio("prcc", seed)
    for person, (camera, number), index in product(
        (*_PRCC_TRAIN_PEOPLE, *_PRCC_TEST_PEOPLE), _PRCC_CAMERAS.items(), range(_PRCC_IMAGES)
    ):
        outfit = "2" if camera == "C" else "1"
        image, _ = studio.photograph(person, number, index, outfit=int(outfit) - 1)
        name = f"cropped_rgb{index * 8 + 1:03d}.jpg"
        if person in _PRCC_TEST_PEOPLE:
            split: Split = "gallery" if camera == "A" else "query"
            path = f"rgb/test/{camera}/{person:03d}/{name}"
        else:
            split = "val" if index == _PRCC_IMAGES - 1 else "train"
            path = f"rgb/{split}/{person:03d}/{camera}_{name}"
        studio.add(layout, image, path, split=split, person=f"{person:03d}", camera=camera, clothes=outfit)
    sketch, _ = studio.photograph(1, 1, 0)
    studio.save(sketch.convert("L"), layout, "sketch/train/001/A_cropped_rgb001.jpg")
    return layout
