"""A small synthetic world in Market-1501's layout, its training images, and recipes that read it."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from chatreid_plugin.config import BuildSettings, SourceSettings
from chatreid_plugin.demo.world import WorldSummary, write_world
from chatreid_plugin.engine.sampler import ImagePool
from chatreid_plugin.images import ImagePolicy
from chatreid_plugin.records import ImageRecord


@pytest.fixture(scope="session")
def shared_world(tmp_path_factory: pytest.TempPathFactory) -> WorldSummary:
    """Write a world once; nothing in it may be changed."""
    return write_world(
        tmp_path_factory.mktemp("engine") / "world",
        train_people=8,
        test_people=3,
        cameras=3,
        images_per_camera=2,
        queries_per_person=2,
        distractors=5,
        junk=4,
    )


@pytest.fixture
def world(shared_world: WorldSummary, tmp_path: Path) -> Path:
    """Return a copy of the world that a test may damage."""
    return shutil.copytree(shared_world.root, tmp_path / "world")


@pytest.fixture
def make_source(tmp_path: Path) -> Callable[..., SourceSettings]:
    """Return a function that makes a source's settings; the world by default."""

    def make(**changes: Any) -> SourceSettings:
        values = {"name": "market1501", "parser": "market1501", "root": tmp_path / "world"}
        return SourceSettings.model_validate(values | {"allow_count_mismatch": True} | changes)

    return make


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
        }
        return BuildSettings.model_validate(values | changes)

    return make


@pytest.fixture
def make_image() -> Callable[..., Path]:
    """Return a function that writes an image file, whatever its name says of the format."""

    def make(path: Path, size: tuple[int, int] = (32, 64), format: str = "JPEG") -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Noise, so that the file is longer than its header and can be cut short.
        Image.effect_noise(size, 50).convert("RGB").save(path, format=format)
        return path

    return make


@pytest.fixture
def make_pool() -> Callable[..., ImagePool]:
    """Return a function that makes a pool: people x cameras x images, a caption and attributes for everyone.

    ``colours`` is the number of colours of the upper clothing, given to the people in turn; further names are fields
    of all records.
    """

    def make(
        people: int = 20,
        cameras: int = 4,
        images: int = 3,
        colours: int = 5,
        size: tuple[int, int] = (64, 128),
        stage: int = 2,
        **changes: Any,
    ) -> ImagePool:
        records: list[ImageRecord] = []
        for person in range(people):
            looks = {"upper_colour": f"colour {person % colours}", "code": str(person)}
            for camera in range(cameras):
                for image in range(images):
                    path = f"{person}_{camera}_{image}.jpg"
                    record = ImageRecord(f"own/{path}", "own", "train", path, f"own:{person}", str(camera), *size)
                    described = {"captions": (f"person number {person}",), "attributes": looks}
                    records.append(replace(record, **(described | changes)))
        return ImagePool(records, ImagePolicy(stage))

    return make
