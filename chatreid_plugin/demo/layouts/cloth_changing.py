"""The layouts of the sets in which people change clothes: LTCC, PRCC, Celeb-reID, DeepChange, LaST, VC-Clothes."""

from itertools import product
from pathlib import Path

from ...records import Split
from .renderer import Layout, Renderer


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
    layout, renderer = Layout(root / "LTCC_ReID"), Renderer("ltcc", seed)
    frame = 1000
    for (home, person), outfits in _LTCC_PEOPLE.items():
        for outfit, camera, index in product(range(outfits), _LTCC_CAMERAS, range(2)):
            split: Split = "query" if home == "gallery" and index == 0 else home
            frame += 37
            image, _ = renderer.render(person, camera, index, outfit=outfit)
            path = f"{_LTCC_FOLDERS[split]}/{person:03d}_{outfit + 1}_c{camera}_{frame:06d}.png"
            label = f"{person:03d}"
            clothes = f"{label}_{outfit + 1}"
            renderer.add(layout, image, path, split=split, person=label, camera=str(camera), clothes=clothes)
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
    layout, renderer = Layout(root / "prcc"), Renderer("prcc", seed)
    for person, (camera, number), index in product(
        (*_PRCC_TRAIN_PEOPLE, *_PRCC_TEST_PEOPLE), _PRCC_CAMERAS.items(), range(_PRCC_IMAGES)
    ):
        outfit = "2" if camera == "C" else "1"
        image, _ = renderer.render(person, number, index, outfit=int(outfit) - 1)
        name = f"cropped_rgb{index * 8 + 1:03d}.jpg"
        if person in _PRCC_TEST_PEOPLE:
            split: Split = "gallery" if camera == "A" else "query"
            path = f"rgb/test/{camera}/{person:03d}/{name}"
        else:
            split = "val" if index == _PRCC_IMAGES - 1 else "train"
            path = f"rgb/{split}/{person:03d}/{camera}_{name}"
        renderer.add(layout, image, path, split=split, person=f"{person:03d}", camera=camera, clothes=outfit)
    sketch, _ = renderer.render(1, 1, 0)
    renderer.save(sketch.convert("L"), layout, "sketch/train/001/A_cropped_rgb001.jpg")
    return layout


TRAIN_PEOPLE, VAL_PEOPLE, TEST_PEOPLE, CAMERAS, OUTFITS = 3, 2, 3, 2, 2


def write_celebreid(root: Path, seed: int = 0) -> Layout:
    """Write Celeb-reID: no cameras, no clothes labels; the test people's numbers start again."""
    return _write_celeb(root / "Celeb-reID", seed)


def write_celebreid_light(root: Path, seed: int = 0) -> Layout:
    """Write Celeb-reID-light, the same layout in another folder."""
    return _write_celeb(root / "Celeb-reID-light", seed)


def _write_celeb(root: Path, seed: int) -> Layout:
    layout, renderer = Layout(root), Renderer("celebreid", seed)
    for number, outfit, index in product(range(1, TRAIN_PEOPLE + TEST_PEOPLE + 1), range(OUTFITS), range(2)):
        image, _ = renderer.render(number, outfit + 1, index, outfit=outfit)
        shot = 2 * outfit + index + 1
        trains = number <= TRAIN_PEOPLE
        split: Split = "train" if trains else "query" if shot == 1 else "gallery"
        published = number if trains else number - TRAIN_PEOPLE
        path = f"{split}/{published}_{shot}_0.jpg"
        person = str(published) if trains else f"test_{published}"
        renderer.add(layout, image, path, split=split, person=person, camera=path)
    return layout


def write_deepchange(root: Path, seed: int = 0) -> Layout:
    """Write DeepChange: five folders, each with a list of images and tracklets; a tracklet for each outfit."""
    layout, renderer = Layout(root), Renderer("deepchange", seed)
    lists: dict[str, list[str]] = {
        folder: []
        for folder in ("train-set", "val-set-query", "val-set-gallery", "test-set-query", "test-set-gallery")
    }
    tracklets: dict[str, str] = {}
    people = range(1, TRAIN_PEOPLE + VAL_PEOPLE + TEST_PEOPLE + 1)
    for number, camera, outfit, index in product(people, range(1, CAMERAS + 1), range(OUTFITS), range(2)):
        image, _ = renderer.render(number, camera, index, outfit=outfit)
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
        renderer.add(layout, image, path, split=split, person=f"P{number}", camera=f"C{camera:02d}", clothes=clothes)
        if split in ("query", "gallery"):
            tracklets[path] = tracklet
    for folder, lines in lists.items():
        (root / f"{folder}-bbox.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    layout.protocol["tracklets"] = tracklets
    return layout


def write_last(root: Path, seed: int = 0) -> Layout:
    """Write LaST: folders of people but for queries; the numbers start again in each set, clothes are for training."""
    layout, renderer = Layout(root), Renderer("last", seed)
    sets = (("train", TRAIN_PEOPLE), ("val", VAL_PEOPLE), ("test", TEST_PEOPLE))
    number = 0
    for name, people in sets:
        for published in range(1, people + 1):
            number += 1
            for outfit, index in product(range(OUTFITS), range(2)):
                image, _ = renderer.render(number, outfit + 1, index, outfit=outfit)
                file = f"{published:06d}_s{outfit:06d}_{index:04d}_{outfit + 1}.jpg"
                part = "query" if index == 0 else "gallery"
                split: Split = "train" if name == "train" else "val" if name == "val" else part
                if name == "train":
                    path = f"train/{published:06d}/{file}"
                else:
                    path = f"{name}/query/{file}" if part == "query" else f"{name}/gallery/{published:06d}/{file}"
                person = f"{published:06d}" if name == "train" else f"{name}_{published:06d}"
                clothes = str(outfit + 1) if name == "train" else None
                renderer.add(layout, image, path, split=split, person=person, camera=path, clothes=clothes)
    return layout


def write_vcclothes(root: Path, seed: int = 0) -> Layout:
    """Write VC-Clothes: cameras 1 to 3 see the first outfit, camera 4 the second."""
    layout, renderer = Layout(root), Renderer("vcclothes", seed)
    for number, camera, index in product(range(1, TRAIN_PEOPLE + TEST_PEOPLE + 1), range(1, 5), range(2)):
        outfit = int(camera == 4)
        image, _ = renderer.render(number, camera, index, outfit=outfit)
        split: Split = "train" if number <= TRAIN_PEOPLE else "query" if index == 0 else "gallery"
        person, clothes = f"{number:03d}", f"{outfit + 1:02d}"
        path = f"{split}/{person}-{camera:02d}-{clothes}-{index + 1:02d}.jpg"
        renderer.add(layout, image, path, split=split, person=person, camera=str(camera), clothes=clothes)
    layout.protocol |= {"same_clothes_cameras": ["2", "3"], "cross_clothes_cameras": ["3", "4"]}
    return layout


LAYOUTS = {
    "ltcc": write_ltcc,
    "prcc": write_prcc,
    "celebreid:full": write_celebreid,
    "celebreid:light": write_celebreid_light,
    "deepchange": write_deepchange,
    "last": write_last,
    "vcclothes": write_vcclothes,
}
