"""A tiny data set in a temporary folder, and the golden generator, for the evaluator's tests."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from chatreid_plugin.config import SourceSettings
from chatreid_plugin.demo.layouts import LAYOUTS
from chatreid_plugin.engine.parsing import parse_source
from chatreid_plugin.engine.sources import describe_origin
from chatreid_plugin.eval_settings import EvalSettings
from chatreid_plugin.records import ImageRecord, Split
from chatreid_plugin.shards import write_manifest


GOLDEN = Path(__file__).parents[1] / "golden" / "make_vectors.py"
COLOURS = ((200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30))
SIZE = (24, 48)

Item = tuple[str, str, str]
MakeWorld = Callable[..., Path]
ParseLayout = Callable[[str], Path]


@pytest.fixture(scope="session")
def golden() -> ModuleType:
    """Return tests/golden/make_vectors.py as a module."""
    spec = importlib.util.spec_from_file_location("golden_make_vectors", GOLDEN)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def make_record(split: str, person: str, camera: str, name: str = "") -> ImageRecord:
    """Return a record of the data set ``tiny``."""
    path = f"{split}/{name or f'{person}_c{camera}'}.png"
    width, height = SIZE
    return ImageRecord(f"tiny/{path}", "tiny", cast(Split, split), path, f"tiny:{person}", camera, width, height)


def list_default_items() -> list[Item]:
    """Four people, each queried in camera 1 and seen in cameras 1, 2 and 3 of the gallery."""
    queries = [("query", str(person), "1") for person in range(1, 5)]
    return queries + [("gallery", str(person), str(camera)) for person in range(1, 5) for camera in (1, 2, 3)]


@pytest.fixture
def make_world(tmp_path: Path) -> MakeWorld:
    """Return a function that writes images and a manifest; each person has a colour of its own."""

    def make(items: Sequence[Item] | None = None, *, images: bool = True) -> Path:
        records: list[ImageRecord] = []
        for number, (split, person, camera) in enumerate(items or list_default_items()):
            record = make_record(split, person, camera, f"{person}_c{camera}_{number}")
            records.append(record)
            if images:
                file = tmp_path / "images" / record.path
                file.parent.mkdir(parents=True, exist_ok=True)
                red, green, blue = COLOURS[int(person) % len(COLOURS)]
                colour = np.array([red, green, min(255, blue + number % 4)])
                shading = np.linspace(0.3, 1.0, SIZE[1])[:, None, None] * np.ones((1, SIZE[0], 1))
                Image.fromarray((colour * shading).astype(np.uint8)).save(file)
        manifest = tmp_path / "manifests" / "tiny.parquet"
        write_manifest(manifest, records, tmp_path / "images", {"made_by": "test"})
        return manifest

    return make


@pytest.fixture
def make_settings(tmp_path: Path) -> Callable[..., EvalSettings]:
    """Return a function that makes settings for a manifest, by default with the oracle and no filter."""

    def make(manifest: Path, **changes: Any) -> EvalSettings:
        values: dict[str, Any] = {
            "protocol": "folder",
            "manifest": manifest,
            "backend": "oracle",
            "filter": "none",
            "output_dir": tmp_path / "out",
        }
        return EvalSettings.model_validate(values | changes)

    return make


@pytest.fixture(scope="session")
def parse_layout(tmp_path_factory: pytest.TempPathFactory) -> ParseLayout:
    """Return a function that writes a layout, parses it once and returns its manifest."""
    root = tmp_path_factory.mktemp("benchmarks")

    def parse(layout: str) -> Path:
        name, _, variant = layout.partition(":")
        manifest = root / f"{name}{variant}.parquet"
        if not manifest.exists():
            LAYOUTS[layout](root / "data" / manifest.stem, 0)
            folder = root / "data" / manifest.stem
            source = SourceSettings(name=name, root=folder, variant=variant or None, allow_count_mismatch=True)
            report = parse_source(source)
            write_manifest(
                manifest, report.records, report.root, {**describe_origin(source), "protocol": report.protocol}
            )
        return manifest

    return parse
