"""CUHK03's layouts: ``cuhk-03.mat`` as MATLAB 7.3 writes it, the new protocol's configurations, and the NP folders."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image
from scipy.io import savemat

from ...records import ImageRecord, Split
from .renderer import Layout, Renderer


# People of each of the five camera pairs.
PAIRS = (4, 2, 1, 1, 1)
CELLS = 10
# Cells (from 1) with an image: two of the first view, two of the second; the detector missed one person once.
FILLED = (1, 5, 6, 8)
MISSED = "1_002_1_05.png"
# Test people of the new protocol, (pair, person); one image of each view is the query.
TESTED = ((1, 3), (1, 4), (2, 2), (5, 1))
QUERY_CELLS = (1, 6)
TRIALS = 20
_NP_FOLDERS: dict[Split, str] = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
# What MATLAB writes before the HDF5 file begins.
_USER_BLOCK = 512

Shot = tuple[int, int, int]


def _list_shots(boxes: str) -> dict[str, Shot]:
    """Return file name -> (pair, person, cell) in the order of the published list."""
    shots = {
        f"{pair}_{person:03d}_{1 if cell <= CELLS // 2 else 2}_{cell:02d}.png": (pair, person, cell)
        for pair, people in enumerate(PAIRS, 1)
        for person in range(1, people + 1)
        for cell in FILLED
    }
    return {name: shot for name, shot in shots.items() if boxes == "labeled" or name != MISSED}


def _render(renderer: Renderer, boxes: str) -> dict[str, Image.Image]:
    """Return file name -> image; a detector cuts its boxes somewhat tighter than people do."""
    images: dict[str, Image.Image] = {}
    for name, (pair, person, cell) in _list_shots(boxes).items():
        number, camera = sum(PAIRS[: pair - 1]) + person, 2 * pair - (cell <= CELLS // 2)
        image, _ = renderer.render(number, camera, cell)
        images[name] = image if boxes == "labeled" else image.crop((1, 1, image.width - 1, image.height - 1))
    return images


def _get_split(shot: Shot) -> Split:
    pair, person, cell = shot
    if (pair, person) not in TESTED:
        return "train"
    return "query" if cell in QUERY_CELLS else "gallery"


def _list_trials() -> list[list[tuple[int, int]]]:
    """Return the 20 classic test sets: two (pair, person) each, another first one from trial to trial."""
    people = [(pair, person) for pair, count in enumerate(PAIRS, 1) for person in range(1, count + 1)]
    return [[people[trial % len(people)], people[(trial + 3) % len(people)]] for trial in range(TRIALS)]


def _store(file: h5py.File, value: Any, **attributes: Any) -> Any:
    """Write a MATLAB value among the file's nameless ones and return the reference to it."""
    data = file.create_dataset(f"#refs#/{len(file['#refs#'])}", data=value)  # pyright: ignore[reportArgumentType]
    data.attrs.update(attributes)
    return data.ref


def _write_raw_file(path: Path, boxes_images: Mapping[str, Mapping[str, Image.Image]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w", userblock_size=_USER_BLOCK) as file:
        file.create_group("#refs#")
        for boxes, images in boxes_images.items():
            shots = {shot: images[name] for name, shot in _list_shots(boxes).items()}
            pairs: list[Any] = []
            for pair, people in enumerate(PAIRS, 1):
                cells = np.empty((CELLS, people), dtype=h5py.ref_dtype)
                for cell, person in np.ndindex(cells.shape):
                    image = shots.get((pair, person + 1, cell + 1))
                    if image is None:
                        reference = _store(file, np.zeros(2, dtype=np.uint64), MATLAB_empty=1)
                    else:
                        reference = _store(file, np.asarray(image).T, MATLAB_class=np.bytes_("uint8"))
                    cells[cell, person] = reference
                pairs.append(_store(file, cells, MATLAB_class=np.bytes_("cell")))
            file.create_dataset(boxes, data=np.array([pairs], dtype=h5py.ref_dtype))
        trials = [_store(file, np.array(trial, dtype=np.float64).T) for trial in _list_trials()]
        file.create_dataset("testsets", data=np.array([trials], dtype=h5py.ref_dtype))
    with path.open("r+b") as raw:
        raw.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM")


def _write_configuration(path: Path, boxes: str) -> None:
    shots = _list_shots(boxes)
    names = np.empty((len(shots), 1), dtype=object)
    names[:, 0] = list(shots)
    people = sorted({shot[:2] for shot in shots.values()})
    content: dict[str, Any] = {
        "filelist": names,
        "labels": np.array([[people.index(shot[:2]) + 1] for shot in shots.values()], dtype=np.uint16),
        "camId": np.array([[int(name.split("_")[2])] for name in shots], dtype=np.uint8),
    }
    for split in _NP_FOLDERS:
        chosen = [[index] for index, shot in enumerate(shots.values(), 1) if _get_split(shot) == split]
        content[f"{split}_idx"] = np.array(chosen, dtype=np.uint16)
    savemat(path, content, do_compression=True)


def _write_published(root: Path, seed: int) -> dict[str, dict[str, Image.Image]]:
    renderer = Renderer("cuhk03", seed)
    images = {form: _render(renderer, form) for form in ("labeled", "detected")}
    _write_raw_file(root / "cuhk03_release" / "cuhk-03.mat", images)
    for form in images:
        _write_configuration(root / f"cuhk03_new_protocol_config_{form}.mat", form)
    return images


def _note(layout: Layout, name: str, image: Image.Image, boxes: str, split: Split) -> None:
    """Note the record of an image that the parser has to take out of the .mat file."""
    path = f"images_{boxes}/{name}"
    pair, person, view, _ = name.split("_")
    record = ImageRecord(
        image_id=f"cuhk03/{path}",
        dataset="cuhk03",
        split=split,
        path=path,
        person_id=f"cuhk03:{pair}_{person}",
        camera_id=view,
        width=image.width,
        height=image.height,
    )
    layout.records.append(record)


def write_cuhk03_new(root: Path, seed: int, boxes: str) -> Layout:
    """Write ``cuhk03_release/cuhk-03.mat`` and both configurations of the new protocol: 5 + 4 identities.

    Args:
        root: the folder of the data set.
        seed: names the world.
        boxes: ``detected`` or ``labeled``: whose records to return.
    """
    layout, images = Layout(root), _write_published(root, seed)[boxes]
    for name, shot in _list_shots(boxes).items():
        _note(layout, name, images[name], boxes, _get_split(shot))
    return layout


def write_cuhk03_classic(root: Path, seed: int, boxes: str, trial: int = 1) -> Layout:
    """Write the same files; the records are those of one of the classic protocol's 20 splits (from 1)."""
    layout, images = Layout(root), _write_published(root, seed)[boxes]
    tested = _list_trials()[trial - 1]
    for name, shot in _list_shots(boxes).items():
        _note(layout, name, images[name], boxes, "gallery" if shot[:2] in tested else "train")
    layout.protocol = {"query_is_gallery": True, "trial": trial}
    return layout


def write_cuhk03_np(root: Path, seed: int, boxes: str) -> Layout:
    """Write ``cuhk03-np/<boxes>/{bounding_box_train,query,bounding_box_test}``, numbered as in the published list."""
    layout, renderer = Layout(root / "cuhk03-np"), Renderer("cuhk03", seed)
    images = _render(renderer, boxes)
    shots = _list_shots(boxes)
    people = sorted({shot[:2] for shot in shots.values()})
    for number, (name, shot) in enumerate(shots.items(), 1):
        split, view, person = _get_split(shot), name.split("_")[2], f"{people.index(shot[:2]) + 1:04d}"
        path = f"{boxes}/{_NP_FOLDERS[split]}/{person}_c{view}_{number}.png"
        renderer.add(layout, images[name], path, split=split, person=person, camera=view)
    return layout


LAYOUTS = {
    "cuhk03:detected": partial(write_cuhk03_new, boxes="detected"),
    "cuhk03:labeled": partial(write_cuhk03_new, boxes="labeled"),
    "cuhk03:detected_np": partial(write_cuhk03_np, boxes="detected"),
    "cuhk03:labeled_np": partial(write_cuhk03_np, boxes="labeled"),
    "cuhk03:detected_classic": partial(write_cuhk03_classic, boxes="detected"),
    "cuhk03:labeled_classic": partial(write_cuhk03_classic, boxes="labeled"),
}
