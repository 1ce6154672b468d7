"""Recipes that read a small synthetic world, and its training images."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from chatreid_plugin.archives import Array
from chatreid_plugin.config import BuildSettings
from chatreid_plugin.engine.look_alikes import append_look_alikes
from chatreid_plugin.engine.pool import ImageTable, combine_images
from chatreid_plugin.engine.sampler import ImagePool
from chatreid_plugin.images import ImagePolicy
from chatreid_plugin.records import INSTRUCTION_SCHEMA, ImageRecord, Instruction, convert_instruction_to_row
from chatreid_plugin.shards import make_manifest_table, read_json, write_json, write_shard


@pytest.fixture
def make_recipe(tmp_path: Path, world: Path) -> Callable[..., BuildSettings]:
    """Return a function that makes a recipe which builds from the world, captions included, into ``tmp_path``."""

    def make(**changes: Any) -> BuildSettings:
        source = {
            "name": "world",
            "parser": "market1501",
            "root": world,
            "captions": world / "captions.jsonl",
            "allow_count_mismatch": True,
        }
        values: dict[str, Any] = {
            "sources": [source],
            "manifest_dir": tmp_path / "manifests",
            "output_dir": tmp_path / "dataset_info",
            "records": {"stage1": 20, "stage2": 100, "stage3": 20},
            "gallery": {"max_size": 5},
            "records_per_shard": 8,
            "workers": 1,
        }
        return BuildSettings.model_validate(values | changes)

    return make


@pytest.fixture
def index_images() -> Callable[..., ImagePool]:
    """Return a function that indexes ImageRecords of one source for a stage, with features to compare them by."""

    def index(records: list[ImageRecord], stage: int = 2, features: Array | None = None) -> ImagePool:
        table = ImageTable(combine_images([make_manifest_table(records)]))
        if features is not None:
            pool = ImagePool(table, table.sources[0])
            table = ImageTable(append_look_alikes(table, [pool], [pool.find_look_alikes(features)]))
        return ImagePool(table, table.sources[0], ImagePolicy(stage))

    return index


@pytest.fixture
def make_images() -> Callable[..., list[ImageRecord]]:
    """Return a function that makes records: people x cameras x images, a caption and attributes for everyone.

    ``colours`` is the number of colours of the upper clothing, given to the people in turn; ``outfits`` how many each
    wears, one image after the other (0: unknown); ``infrared`` how many of the cameras see infrared, the last ones;
    with ``views`` every image is described in words of its own.
    Further names are fields of all records.
    """

    def make(
        people: int = 20,
        cameras: int = 4,
        images: int = 3,
        colours: int = 5,
        size: tuple[int, int] = (64, 128),
        outfits: int = 0,
        infrared: int = 0,
        views: bool = False,
        **changes: Any,
    ) -> list[ImageRecord]:
        records: list[ImageRecord] = []
        for person, camera, image in product(range(people), range(cameras), range(images)):
            path = f"{person}_{camera}_{image}.jpg"
            record = ImageRecord(f"own/{path}", "own", "train", path, f"own:{person}", str(camera), *size)
            described = {
                "captions": (f"person number {person}" + (f", view {camera} {image}" if views else ""),),
                "attributes": {"upper_colour": f"colour {person % colours}", "code": str(person)},
                "clothes_id": str(image % outfits) if outfits else None,
                "modality": "visible" if camera < cameras - infrared else "infrared",
            }
            records.append(replace(record, **(described | changes)))
        return records

    return make


@pytest.fixture
def make_pool(make_images: Callable[..., Any], index_images: Callable[..., Any]) -> Callable[..., ImagePool]:
    """Return a function that makes a pool of the images of ``make_images`` for a stage."""

    def make(stage: int = 2, features: Array | None = None, **changes: Any) -> ImagePool:
        return index_images(make_images(**changes), stage, features)

    return make


@pytest.fixture
def write_dataset(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes records as a built data set of one or more shards; it returns the dataset_dir.

    Images lie in ``tmp_path / "crops"``; named settings go into the recipe of the provenance, ``recipe=False`` leaves
    it out.
    """

    def write(
        name: str, records: Sequence[Instruction], *, shard: int = 100, recipe: bool = True, **changes: Any
    ) -> Path:
        folder = tmp_path / "dataset_info"
        for number, first in enumerate(range(0, len(records), shard)):
            rows = [convert_instruction_to_row(record) for record in records[first : first + shard]]
            write_shard(folder / name / f"{number:05d}.parquet", rows, INSTRUCTION_SCHEMA)
        values: dict[str, Any] = {
            "sources": [{"name": "own", "parser": "pattern", "root": "crops"}],
            "manifest_dir": tmp_path / "manifests",
            "records": {"stage2": len(records)},
        }
        if recipe:
            settings = BuildSettings.model_validate(values | changes).model_dump(mode="json")
            write_json(folder / f"{name}.json", {"settings": settings, "records": len(records), "complete": True})
        table = folder / "dataset_info.json"
        entry = {"file_name": name, "formatting": "chatreid", "chatreid": {"image_root": "../crops"}}
        write_json(table, (read_json(table) if table.is_file() else {}) | {name: entry})
        return folder

    return write
