"""Writes the synthetic world as a data set in the folder layout of Market-1501, with captions."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..errors import ConfigError, DataError
from ..pixels import save_image
from ..shards import open_folder_atomically
from ..worker_pool import open_pool
from .people import CAPTION_VARIANTS, Person, describe_person, sample_people
from .render import MAXIMUM_CAMERAS, Camera, make_cameras, render_background, render_partial, render_person


TRAIN_FOLDER = "bounding_box_train"
GALLERY_FOLDER = "bounding_box_test"
QUERY_FOLDER = "query"
CAPTIONS_FILE = "captions.jsonl"
FILE_NAME = re.compile(r"^(?P<pid>-1|\d{4})_c(?P<cam>[1-6])s(?P<seq>\d)_(?P<frame>\d{6})_(?P<det>\d{2})\.jpg$")

_ENTRIES = frozenset({TRAIN_FOLDER, GALLERY_FOLDER, QUERY_FOLDER, CAPTIONS_FILE})
# File names hold four digits of the identity and six of the frame.
_LARGEST_IDENTITY = 9999
_LARGEST_FRAME = 999_999
_RANDOM_STREAM = 3
_IDENTITY, _DISTRACTOR, _JUNK = 0, 1, 2
# Every seventh distractor shows nobody, as a false alarm does; 7 shares no factor with a number of cameras.
_EMPTY_EVERY = 7
_CHUNK = 64


@dataclass(frozen=True, slots=True)
class WorldSummary:
    """What ``write_world`` wrote.

    Attributes:
        root: folder of the data set.
        train_images: images in ``bounding_box_train``.
        gallery_images: images in ``bounding_box_test``, distractors and junk included.
        query_images: images in ``query``.
        distractors: gallery images of identity 0000.
        junk: gallery images of identity -1.
        captioned_images: lines of ``captions.jsonl``.
    """

    root: Path
    train_images: int
    gallery_images: int
    query_images: int
    distractors: int
    junk: int
    captioned_images: int


@dataclass(frozen=True, slots=True)
class _Shot:
    """One image to take: everything that its bytes depend on."""

    path: str
    seed: int
    kind: int
    person: Person
    camera: Camera
    index: int


def write_world(
    root: Path,
    *,
    train_people: int,
    test_people: int,
    cameras: int = 4,
    images_per_camera: int = 2,
    queries_per_person: int | None = None,
    distractors: int = 0,
    junk: int = 0,
    seed: int = 0,
    workers: int = 1,
    overwrite: bool = False,
) -> WorldSummary:
    """Write a world below ``root``; the same arguments give the same bytes, whatever the number of workers.

    Train identities are 1 to ``train_people``, the test identities follow them.

    Args:
        root: folder to create; it appears only when it is complete.
        train_people: identities in ``bounding_box_train``.
        test_people: identities in ``query`` and ``bounding_box_test``.
        cameras: 1 to 6.
        images_per_camera: of each identity; the first one of a test identity is the query, the others are gallery.
        queries_per_person: cameras that give a query per test identity; all of them if None.
        distractors: gallery images of identity 0000: strangers or no person at all.
        junk: gallery images of identity -1: badly cut boxes.
        seed: names the world.
        workers: processes that draw.
        overwrite: replace an earlier world at ``root``.

    Raises:
        ConfigError: a number is out of range.
        DataError: ``root`` is in use, or the disk is full or cannot be written; then ``root`` is as it was.
    """
    queries = cameras if queries_per_person is None else queries_per_person
    _check_range(0, _LARGEST_IDENTITY, train_people=train_people, test_people=test_people)
    _check_range(0, _LARGEST_IDENTITY, people=train_people + test_people)
    _check_range(0, _LARGEST_FRAME, distractors=distractors, junk=junk, seed=seed)
    _check_range(1, _LARGEST_FRAME, images_per_camera=images_per_camera, workers=workers)
    _check_range(1, MAXIMUM_CAMERAS, cameras=cameras)
    _check_range(0, cameras, queries_per_person=queries)
    _check_target(root, overwrite)
    network = make_cameras(cameras, seed)
    people = sample_people(train_people + test_people + distractors + junk, seed)
    tested, strangers = people[train_people : train_people + test_people], people[train_people + test_people :]
    known = _plan_train(people[:train_people], network, images_per_camera, seed)
    known += _plan_test(tested, network, images_per_camera, queries, seed)
    extra = _plan_extra(strangers[:distractors], _DISTRACTOR, network, seed)
    extra += _plan_extra(strangers[distractors:], _JUNK, network, seed)
    with open_folder_atomically(root) as folder:
        for name in (TRAIN_FOLDER, GALLERY_FOLDER, QUERY_FOLDER):
            (folder / name).mkdir()
        postures = _take_shots(folder, known + extra, workers)
        _write_captions(folder / CAPTIONS_FILE, known, postures)
    return _summarise(root, known + extra)


def _check_range(least: int, most: int, **numbers: int) -> None:
    for name, value in numbers.items():
        if not least <= value <= most:
            raise ConfigError(f"{name} must be {least} to {most}, got {value}.")


def _check_target(root: Path, overwrite: bool) -> None:
    """Raise DataError unless ``root`` is free, or holds nothing but a world that may be overwritten."""
    if not root.exists():
        return
    if not root.is_dir():
        raise DataError(f"{root} is a file. Choose another folder for the synthetic world.")
    found = sorted(entry.name for entry in root.iterdir())
    if found and not overwrite:
        raise DataError(f"{root} is not empty. Choose another folder or allow overwriting.")
    foreign = [name for name in found if name not in _ENTRIES]
    if foreign:
        raise DataError(f"{root} holds more than a synthetic world ({foreign[0]}), so it is not overwritten.")


def _plan_train(people: list[Person], network: list[Camera], images_per_camera: int, seed: int) -> list[_Shot]:
    shots: list[_Shot] = []
    for person, camera, index in product(people, network, range(images_per_camera)):
        path = f"{TRAIN_FOLDER}/{_name_file(f'{person.person_number:04d}', camera, index)}"
        shots.append(_Shot(path, seed, _IDENTITY, person, camera, index))
    return shots


def _plan_test(
    people: list[Person], network: list[Camera], images_per_camera: int, queries: int, seed: int
) -> list[_Shot]:
    shots: list[_Shot] = []
    for person, camera, index in product(people, network, range(images_per_camera)):
        # The first camera asked moves on with the person, so that few queries still cover all cameras.
        has_query = (camera.number - person.person_number) % len(network) < queries
        folder = QUERY_FOLDER if has_query and index == 0 else GALLERY_FOLDER
        path = f"{folder}/{_name_file(f'{person.person_number:04d}', camera, index)}"
        shots.append(_Shot(path, seed, _IDENTITY, person, camera, index))
    return shots


def _plan_extra(strangers: list[Person], kind: int, network: list[Camera], seed: int) -> list[_Shot]:
    """Return one shot of each stranger, who has no identity of their own in the gallery."""
    identity = "0000" if kind == _DISTRACTOR else "-1"
    shots: list[_Shot] = []
    for index, person in enumerate(strangers):
        camera = network[index % len(network)]
        path = f"{GALLERY_FOLDER}/{_name_file(identity, camera, index)}"
        shots.append(_Shot(path, seed, kind, person, camera, index))
    return shots


def _name_file(identity: str, camera: Camera, index: int) -> str:
    return f"{identity}_c{camera.number}s1_{index + 1:06d}_00.jpg"


def _take_shots(folder: Path, shots: list[_Shot], workers: int) -> list[str]:
    """Write the images and return the posture seen in each; empty where no caption is needed."""
    take = partial(_take_shot, folder)
    if workers == 1:
        return _show_progress(map(take, shots), len(shots))
    with open_pool(workers) as pool:
        return _show_progress(pool.map(take, shots, chunksize=_CHUNK), len(shots))


def _show_progress(postures: Iterable[str], total: int) -> list[str]:
    return list(tqdm(postures, total=total, desc="synthetic world", unit="image"))


def _take_shot(folder: Path, shot: _Shot) -> str:
    key = (_RANDOM_STREAM, shot.seed, shot.kind, shot.person.person_number, shot.camera.number, shot.index)
    rng = np.random.default_rng(key)
    posture = ""
    if shot.kind == _JUNK:
        image = render_partial(shot.person, shot.camera, rng)
    elif shot.kind == _DISTRACTOR and shot.index % _EMPTY_EVERY == _EMPTY_EVERY - 1:
        image = render_background(shot.camera, rng)
    else:
        image, posture = render_person(shot.person, shot.camera, rng)
    save_image(image, folder / shot.path, quality=shot.camera.jpeg_quality)
    return posture


def _write_captions(path: Path, shots: list[_Shot], postures: list[str]) -> None:
    """Write one line per shot of an identity; ``postures`` may go on past the shots."""
    lines = [_describe_shot(shot, posture) for shot, posture in zip(shots, postures, strict=False)]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in sorted(lines, key=_get_path)), encoding="utf-8")


def _get_path(line: dict[str, object]) -> str:
    return str(line["path"])


def _describe_shot(shot: _Shot, posture: str) -> dict[str, object]:
    first = shot.person.person_number + shot.camera.number + shot.index
    second = first + 1 + shot.camera.number % (CAPTION_VARIANTS - 1)
    captions = [describe_person(shot.person, variant, posture) for variant in (first, second)]
    return {"path": shot.path, "captions": captions, "attributes": shot.person.attributes}


def _summarise(root: Path, shots: list[_Shot]) -> WorldSummary:
    folders = Counter(shot.path.split("/")[0] for shot in shots)
    kinds = Counter(shot.kind for shot in shots)
    return WorldSummary(
        root=root,
        train_images=folders[TRAIN_FOLDER],
        gallery_images=folders[GALLERY_FOLDER],
        query_images=folders[QUERY_FOLDER],
        distractors=kinds[_DISTRACTOR],
        junk=kinds[_JUNK],
        captioned_images=kinds[_IDENTITY],
    )
