"""A folder of twelve plain crops, and a model that reads their names."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from chatreid_plugin.archives import ScoreArray
from chatreid_plugin.datasets.benchmark import Query
from chatreid_plugin.records import ImageRecord
from chatreid_plugin.search import ranking


COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
# So that whatever runs here scores as it does on any machine.
OWN = ("model.device=cpu", "model.dtype=float32")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write two crops of each colour, in two subfolders, and some that cannot be read; a photo lies beside them."""
    root = tmp_path / "photos"
    for number, colour in enumerate(COLOURS):
        for shade in (0, 1):
            file = root / str(shade) / f"{colour}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.new("RGB", (40, 80 + number % 2), colour)
            picture.paste((0, 0, 0), (0, 0, 40, 8 + 20 * shade))
            picture.save(file)
    (root / "0" / "damaged.jpg").write_bytes(b"no picture")
    (root / "0" / os.fsdecode(b"\xff.png")).write_bytes((root / "0" / "red.png").read_bytes())
    (root / "note.txt").touch()
    (root / "1" / "loop").symlink_to(root)
    photo = Image.new("RGB", (100, 120), "white")
    photo.paste(Image.open(root / "0" / "red.png").resize((50, 90)), (10, 20))
    photo.save(tmp_path / "photo.png")
    return root


class NamedScorer:
    """Says Yes where a picture's file is named after the colour asked for, or after the query picture's."""

    confidence: Literal["margins"] = "margins"
    filled = 0
    fingerprint: Mapping[str, Any] = {}

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def prepare(self, queries: Sequence[Query], gallery: Sequence[ImageRecord], planned: Any = ()) -> None:
        pass

    def score_pairs(self, query: Query, candidates: Sequence[ImageRecord], task: str) -> ScoreArray:
        self.asked.append((task, len(candidates)))
        wanted = (
            {**query.attributes}.get("colour") or query.text or (Path(query.image.path).stem if query.image else None)
        )
        shade = query.attributes.get("shade")
        fits = [shade in (None, Path(one.path).parent.name) for one in candidates]
        found = [3.0 if wanted in (None, Path(one.path).stem) else -3.0 for one in candidates]
        found = [score - 8.0 * (not fit) for score, fit in zip(found, fits, strict=True)]
        # So that an order is known.
        later = [0.01 * (Path(one.path).parent.name == "1") for one in candidates]
        return np.array(found, dtype=np.float32) - np.array(later, dtype=np.float32)

    def choose(self, query: Query, windows: Sequence[Sequence[ImageRecord]], task: str) -> list[ScoreArray]:
        return [self.score_pairs(query, window, task) for window in windows]

    def answer(self, prompt: Any, images: Sequence[ImageRecord], limit: int) -> str:
        return f"{'|'.join(prompt.segments)} {[Path(one.path).stem for one in images]}"


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> NamedScorer:
    """Let a server's place be taken by the model that reads names; settings: ``scoring.backend=http``."""
    scorer = NamedScorer()
    monkeypatch.setattr(ranking, "make_scorer", lambda *arguments: scorer)
    return scorer


@pytest.fixture
def write_list(folder: Path) -> Callable[[], Path]:
    """Return a function that writes a list of the crops with cameras, times and attributes."""

    def write() -> Path:
        lines = ["path;camera;time;colour;shade"]
        for number, file in enumerate(sorted(folder.glob("[01]/*.png"))):
            if file.name.isascii():
                shade, colour = file.parent.name, file.stem
                lines.append(f"photos/{shade}/{file.name};c{shade};2026-03-0{1 + number % 3}T10:00;{colour};{shade}")
        path = folder.parent / "list.csv"
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return write
