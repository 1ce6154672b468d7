"""Renders synthetic people for the layouts of the published data sets: outfits, infrared, junk, false alarms."""

import zlib
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ...pixels import save_image
from ...records import ImageRecord, Modality, Split
from ..people import CAPTION_VARIANTS, Person, describe_person, sample_people
from ..render import MAXIMUM_CAMERAS, Camera, make_cameras, render_background, render_partial, render_person


# What a change of clothes changes; body, hair and age stay.
CLOTHES = ("upper_type", "upper_colour", "upper_pattern", "lower_type", "lower_colour", "shoes", "bag", "hat")
# Near infrared shows no colour: dyed cloth of every colour looks about alike.
COLOURLESS = {"upper_colour": "grey", "lower_colour": "grey"}
_RANDOM_STREAM = 5


# Every image asks for them, and a person is drawn after all those before it.
@lru_cache(maxsize=1024)
def _draw_person(key: int, number: int) -> Person:
    return sample_people(1, key, number)[0]


@lru_cache(maxsize=64)
def _place_cameras(key: int) -> tuple[Camera, ...]:
    return tuple(make_cameras(MAXIMUM_CAMERAS, key))


@dataclass(slots=True)
class Layout:
    """A synthetic data set on disk and what a parser has to find in it.

    Attributes:
        root: the folder that the records' paths are relative to.
        records: the labels that the generator meant (hashes, sharpness and brightness are left empty).
        skipped: reason -> number of files that a parser has to leave out.
        protocol: what the parser has to keep for evaluation beside the records.
    """

    root: Path
    records: list[ImageRecord] = field(default_factory=list[ImageRecord])
    skipped: dict[str, int] = field(default_factory=dict[str, int])
    protocol: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Renderer:
    """Renders into the layout of one data set; the same seed gives the same pixels.

    Every data set shows people of its own, so that what an audit finds between two of them was meant.

    Attributes:
        dataset: name of the data set, as the parser calls it.
        seed: names the people, together with ``world``.
        world: whose people and pictures; those of another data set if this one is made from it.
    """

    dataset: str
    seed: int = 0
    world: str | None = None

    @property
    def key(self) -> int:
        """What all random draws of this world start from."""
        return zlib.crc32(f"{self.world or self.dataset}/{self.seed}".encode())

    def get_person(self, number: int, outfit: int = 0) -> Person:
        """Return a person (from 1) in one of their outfits (from 0)."""
        person = _draw_person(self.key, number)
        if outfit == 0:
            return person
        other = _draw_person(self.key + outfit, number)
        return replace(person, attributes=person.attributes | {name: other.attributes[name] for name in CLOTHES})

    def render(
        self, number: int, camera: int, index: int, *, outfit: int = 0, infrared: bool = False
    ) -> tuple[Image.Image, tuple[str, str]]:
        """Return an RGB crop and two captions of it. Cameras count from 1; beyond the sixth, the looks repeat."""
        person = self.get_person(number, outfit)
        shown = replace(person, attributes=person.attributes | COLOURLESS) if infrared else person
        rng = np.random.default_rng((_RANDOM_STREAM, self.key, number, camera, index, outfit, infrared))
        image, posture = render_person(shown, self._get_camera(camera), rng)
        if infrared:
            image = ImageOps.autocontrast(image.convert("L")).convert("RGB")
        first = number + camera + index
        captions = [describe_person(person, variant % CAPTION_VARIANTS, posture) for variant in (first, first + 1)]
        return image, (captions[0], captions[1])

    def render_junk(self, number: int, camera: int, index: int) -> Image.Image:
        """Return a badly cut box."""
        rng = np.random.default_rng((_RANDOM_STREAM, self.key, number, camera, index, 0, 2))
        return render_partial(self.get_person(number), self._get_camera(camera), rng)

    def render_background(self, camera: int, index: int) -> Image.Image:
        """Return a box without anybody."""
        rng = np.random.default_rng((_RANDOM_STREAM, self.key, 0, camera, index, 0, 3))
        return render_background(self._get_camera(camera), rng)

    def _get_camera(self, number: int) -> Camera:
        return _place_cameras(self.key)[(number - 1) % MAXIMUM_CAMERAS]

    def save(self, image: Image.Image, layout: Layout, path: str) -> None:
        """Write an image below the layout's root, in the format that the name's ending says."""
        target = layout.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        save_image(image, target)

    def add(
        self,
        layout: Layout,
        image: Image.Image,
        path: str,
        *,
        split: Split,
        person: str,
        camera: str,
        clothes: str | None = None,
        modality: Modality = "visible",
        captions: tuple[str, ...] = (),
        attributes: dict[str, str] | None = None,
    ) -> None:
        """Write an image and note the record that a parser has to make of it; the labels are as published."""
        self.save(image, layout, path)
        record = ImageRecord(
            image_id=f"{self.dataset}/{path}",
            dataset=self.dataset,
            split=split,
            path=path,
            person_id=f"{self.dataset}:{person}",
            camera_id=camera,
            width=image.width,
            height=image.height,
            clothes_id=clothes,
            modality=modality,
            captions=captions,
            attributes=attributes or {},
        )
        layout.records.append(record)
