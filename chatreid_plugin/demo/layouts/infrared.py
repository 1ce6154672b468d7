"""The layouts of the visible-infrared sets: SYSU-MM01 with its permutations, RegDB with its ten splits, LLCM."""

from itertools import combinations, product
from pathlib import Path

import numpy as np
from scipy.io import savemat

from ...records import Modality, Split
from .renderer import Layout, Renderer


# SYSU-MM01: identities of exp/*.txt, which need not follow each other; number 8 is in no list.
SYSU_LISTS = {"train_id": (1, 2, 3), "val_id": (4,), "test_id": (5, 7, 9)}
SYSU_UNLISTED = 8
SYSU_INFRARED = (3, 6)
SYSU_CAMERAS = range(1, 7)
SYSU_IMAGES = 2
# One identity was not seen indoors, another has more images than a multi-shot gallery takes.
SYSU_ABSENT = {(7, 1), (7, 2)}
SYSU_MANY, SYSU_MANY_IMAGES = (5, 1), 12
TRIALS = 10
REGDB_PEOPLE, REGDB_IMAGES = (1, 12, 103, 285), 2
REGDB_MODALITIES: dict[str, Modality] = {"visible": "visible", "thermal": "infrared"}
LLCM_TRAIN_PEOPLE, LLCM_TEST_PEOPLE = (1, 2, 5), (3, 4)
LLCM_MODALITIES: dict[str, Modality] = {"vis": "visible", "nir": "infrared"}


def write_sysumm01(root: Path, seed: int = 0) -> Layout:
    """Write ``cam1`` to ``cam6``, ``exp`` and ``rand_perm_cam.mat``: 4 training and 3 test identities."""
    layout, renderer = Layout(root), Renderer("sysumm01", seed)
    counts: dict[tuple[int, int], int] = {}
    people = sorted({SYSU_UNLISTED, *(number for numbers in SYSU_LISTS.values() for number in numbers)})
    for person, camera in product(people, SYSU_CAMERAS):
        images = SYSU_MANY_IMAGES if (person, camera) == SYSU_MANY else SYSU_IMAGES
        counts[person, camera] = 0 if (person, camera) in SYSU_ABSENT else images
        for index in range(counts[person, camera]):
            _add_sysu_image(layout, renderer, person, camera, index)
    layout.skipped["identity in no split list"] = SYSU_IMAGES * len(SYSU_CAMERAS)
    _write_sysu_lists(root / "exp")
    layout.protocol["trials"] = _write_permutations(root / "rand_perm_cam.mat", counts, seed)
    return layout


def _add_sysu_image(layout: Layout, renderer: Renderer, person: int, camera: int, index: int) -> None:
    infrared = camera in SYSU_INFRARED
    image, _ = renderer.render(person, camera, index, infrared=infrared)
    path = f"cam{camera}/{person:04d}/{index + 1:04d}.jpg"
    if person == SYSU_UNLISTED:
        renderer.save(image, layout, path)
        return
    tested: Split = "query" if infrared else "gallery"
    renderer.add(
        layout,
        image,
        path,
        split=tested if person in SYSU_LISTS["test_id"] else "train",
        person=f"{person:04d}",
        camera=str(camera),
        modality="infrared" if infrared else "visible",
    )


def _write_sysu_lists(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lists = {**SYSU_LISTS, "available_id": sorted(number for numbers in SYSU_LISTS.values() for number in numbers)}
    for name, numbers in lists.items():
        (folder / f"{name}.txt").write_text(",".join(map(str, numbers)) + "\n", encoding="utf-8")
        savemat(str(folder / f"{name}.mat"), {"id": np.array([numbers], dtype=np.uint16)})


def _write_permutations(path: Path, counts: dict[tuple[int, int], int], seed: int) -> list[dict[str, list[list[str]]]]:
    """Write the permutations as published (a cell for each camera: a cell for each identity: 10 x images, from 1).

    Returns what a gallery takes in each trial: the first ten images of each test identity and visible camera.
    """
    rng = np.random.default_rng(seed)
    trials: list[dict[str, list[list[str]]]] = [{"paths": []} for _ in range(TRIALS)]
    largest = max(person for person, _ in counts)
    cameras = np.empty((len(SYSU_CAMERAS), 1), dtype=object)
    for camera in SYSU_CAMERAS:
        cameras[camera - 1, 0] = np.empty((largest, 1), dtype=object)
    for person, camera in product(range(1, largest + 1), SYSU_CAMERAS):
        numbers = np.arange(1, counts.get((person, camera), 0) + 1, dtype=np.uint8)
        permutations = np.stack([rng.permutation(numbers) for _ in range(TRIALS)])
        cameras[camera - 1, 0][person - 1, 0] = permutations
        if person in SYSU_LISTS["test_id"] and camera not in SYSU_INFRARED and len(numbers):
            for trial, row in zip(trials, permutations.tolist(), strict=True):
                trial["paths"].append([f"cam{camera}/{person:04d}/{number:04d}.jpg" for number in row[:10]])
    savemat(str(path), {"rand_perm_cam": cameras})
    return trials


def write_regdb(root: Path, seed: int = 0) -> Layout:
    """Write ``Visible``, ``Thermal`` and the ten splits of ``idx``; the records are those of the first split."""
    layout, renderer = Layout(root), Renderer("regdb", seed)
    tested = split_regdb(1)[1]
    for person, name, index in product(REGDB_PEOPLE, REGDB_MODALITIES, range(REGDB_IMAGES)):
        modality = REGDB_MODALITIES[name]
        camera = 1 + list(REGDB_MODALITIES).index(name)
        image, _ = renderer.render(person, camera, index, infrared=modality == "infrared")
        test_split: Split = "query" if name == "visible" else "gallery"
        split = test_split if person in tested else "train"
        path = name_regdb_image(person, name, index)
        renderer.add(layout, image, path, split=split, person=str(person), camera=name, modality=modality)
    (root / "idx").mkdir(parents=True, exist_ok=True)
    for trial, name in product(range(1, TRIALS + 1), REGDB_MODALITIES):
        for part, people in zip(("train", "test"), split_regdb(trial), strict=True):
            lines = [
                f"{name_regdb_image(person, name, index)} {label}\n"
                for label, person in enumerate(people)
                for index in range(REGDB_IMAGES)
            ]
            (root / "idx" / f"{part}_{name}_{trial}.txt").write_text("".join(lines), encoding="utf-8")
    layout.protocol["trial"] = 1
    return layout


def split_regdb(trial: int) -> tuple[list[int], list[int]]:
    """Return who trains and who is tested in a trial: half of the people each."""
    halves = list(combinations(REGDB_PEOPLE, len(REGDB_PEOPLE) // 2))
    trained = halves[trial % len(halves)]
    return list(trained), [person for person in REGDB_PEOPLE if person not in trained]


def name_regdb_image(person: int, name: str, index: int) -> str:
    """Return the path of a RegDB image; ``name`` is ``visible`` or ``thermal``."""
    return f"{name.capitalize()}/{person}/male_back_{name[0]}_{person * 10 + index:05d}_{person}.bmp"


def write_llcm(root: Path, seed: int = 0) -> Layout:
    """Write ``vis`` and ``nir`` for training, ``test_vis`` and ``test_nir``; infrared camera 3 saw nobody."""
    layout, renderer = Layout(root), Renderer("llcm", seed)
    (root / "idx").mkdir(parents=True, exist_ok=True)
    for name, modality in LLCM_MODALITIES.items():
        lines: list[str] = []
        cameras = (1, 2, 3) if name == "vis" else (1, 2, 4)
        for person, camera, index in product(LLCM_TRAIN_PEOPLE + LLCM_TEST_PEOPLE, cameras, range(2)):
            image, _ = renderer.render(person, camera, index, infrared=modality == "infrared")
            file = f"{person:04d}/{person:04d}_c{camera:02d}_s{185535 + index}_f{7010 + index}_{name}.jpg"
            split: Split = "query" if name == "nir" else "gallery"
            path = f"test_{name}/cam{camera}/{file}"
            if person in LLCM_TRAIN_PEOPLE:
                split, path = "train", f"{name}/{file}"
                lines.append(f"{path} {LLCM_TRAIN_PEOPLE.index(person)}\n")
            renderer.add(
                layout, image, path, split=split, person=f"{person:04d}", camera=str(camera), modality=modality
            )
        (root / "idx" / f"train_{name}.txt").write_text("".join(lines), encoding="utf-8")
    tested = ",".join(map(str, LLCM_TEST_PEOPLE))
    (root / "idx" / "test_id.txt").write_text(f"{tested}\n", encoding="utf-8")
    return layout


LAYOUTS = {
    "sysumm01": write_sysumm01,
    "regdb": write_regdb,
    "llcm": write_llcm,
}
