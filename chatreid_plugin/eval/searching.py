"""Ranking one's own folder for one photo or a sentence (``chatreid rank``): no labels, no metrics.

The evaluator's own parts: the filter keeps the most similar images, the scorer is asked about each, and what the
filter left out follows in its order.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..archives import ScoreArray
from ..config import check_settings
from ..datasets.benchmark import Benchmark, Query
from ..errors import ConfigError, DataError
from ..html import render_template
from ..pixels import encode_thumbnail, open_crop
from ..printing import make_printable
from ..records import ImageRecord
from ..shards import write_text
from .backends import Models, make_scorer
from .candidates import Plan, filter_protocol
from .distributed import Processes
from .fusion import fuse_scores
from .measure import Ranking
from .questions import score_query
from .settings import RankSettings


TEMPLATE = Path(__file__).with_name("search.html.j2")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
THREADS = 8
UNREADABLE_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Found:
    """A ranked image: its path below the folder, and its score; None if the filter left it out."""

    rank: int
    path: str
    score: float | None


@dataclass(frozen=True, slots=True)
class Search:
    """What was searched for, where, and what was found.

    Attributes:
        folder: the gallery.
        image: the photo, or None.
        text: the words; empty for a photo alone.
        scorer: the model, or what ranks without one.
        images: how many could be read.
        scored: how many of them the filter kept.
        unreadable: path below the folder, to what is wrong with the file.
        found: the first ones.
    """

    folder: Path
    image: Path | None
    text: str
    scorer: str
    images: int
    scored: int
    unreadable: dict[str, str]
    found: list[Found]

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False, default=str)

    def render(self) -> str:
        """Return it as a small table."""
        lines = [self.title, "", "rank     score  image"]
        lines += [
            f"{one.rank:>4}{'' if one.score is None else f'{one.score:.4f}':>10}  {one.path}" for one in self.found
        ]
        if self.unreadable:
            lines += ["", f"{len(self.unreadable)} file(s) could not be read and are not ranked:"]
            lines += [f"  {reason}" for reason in list(self.unreadable.values())[:UNREADABLE_SHOWN]]
        return "\n".join(lines)

    @property
    def title(self) -> str:
        """Whom was asked for, and who ranked how many images."""
        words = f'"{self.text}"' if self.text else ""
        asked = " and ".join(part for part in ("" if self.image is None else str(self.image), words) if part)
        where = f"{self.images:,} images of {self.folder}, {self.scored:,} of them"
        return make_printable(f"{asked} in {where} scored by {self.scorer}")

    def write_page(self, path: Path) -> None:
        """Write an HTML page with the pictures inside, which opens from disk."""
        query = "" if self.image is None else encode_thumbnail(self.image)
        pictures = [(one, encode_thumbnail(self.folder / one.path)) for one in self.found]
        write_text(path, render_template(TEMPLATE, search=self, query=query, pictures=pictures))


def rank_folder(
    folder: Path,
    image: Path | None,
    text: str,
    model: str | None,
    overrides: Sequence[str] = (),
    *,
    stage: int = 3,
    top: int = 10,
) -> Search:
    """Rank the images below a folder by how likely they show whom the photo shows, the words describe, or both.

    Args:
        folder: the gallery, searched with its subfolders; files that cannot be read are listed.
        image: a photo.
        text: words.
        model: checkpoint; None: the features of ``filter.source`` alone rank (colours by default).
        overrides: keys of eval/*.yaml: filter.top_k=50, scoring.mode=choice, model.device=cpu, ...
        stage: whose image policy applies; 0 for none.
        top: how many are returned.

    Raises:
        ConfigError: nothing is asked for, or without a model words that the features cannot be compared with.
        DataError: the folder has no readable image, or the photo cannot be read.
    """
    settings = _make_settings(image, text, model, overrides, stage)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder. Name the one with the images to rank.")
    records, unreadable = _read_gallery(folder)
    if not records:
        reasons = "".join(f"\n  {reason}" for reason in list(unreadable.values())[:UNREADABLE_SHOWN])
        raise DataError(f"{folder} has no image that can be read ({', '.join(IMAGE_SUFFIXES)}).{reasons}")
    query = Query("query", "query", image=None if image is None else _read_photo(image), text=text)
    protocol = Benchmark("search", "own folder", [query], records, folder.resolve(), "nothing")
    models = Models()
    plan = filter_protocol(settings, protocol, Processes(), models)
    scores, similarities = _score(settings, plan, query, models)
    masks = plan.labels.find_positives(0), plan.labels.find_ignored(0)
    ranking = Ranking(0, np.arange(len(records)), plan.kept[0], scores, similarities, *masks, scores)
    known, order = ranking.list_scores(), ranking.list_order()[:top].tolist()
    found = [Found(rank, records[place].path, known.get(place)) for rank, place in enumerate(order, start=1)]
    return Search(folder, image, text, _name_scorer(settings), len(records), len(known), unreadable, found)


def _make_settings(
    image: Path | None, text: str, model: str | None, overrides: Sequence[str], stage: int
) -> RankSettings:
    if image is None and not text:
        raise ConfigError("Nothing is searched for: give --image, --text or both.")
    source = "none" if image is None and model is not None else "colour"
    values: dict[str, dict[str, Any]] = {
        "model": {"chatreid_stage": stage or None, "model_name_or_path": model},
        "filter": {"tau": -1, "source": source},
        "scoring": {} if model is not None else {"backend": "features"},
    }
    settings = check_settings(values, overrides, RankSettings, "chatreid rank")
    if settings.filter.tau == "auto":
        raise ConfigError(
            "filter.tau: auto needs training identities, and a folder has none; set it to a number, or leave it."
        )
    scoring = settings.scoring
    if scoring.reads_scores or scoring.backend == "oracle":
        raise ConfigError(
            f"scoring.backend: {scoring.backend} knows nothing of your images; give --model, or leave it out."
        )
    if text and not scoring.asks_model and (image is not None or settings.filter.source != "clip"):
        raise ConfigError(
            f"--text needs --model: the features of filter.source: {settings.filter.source} compare images. Words "
            "alone can be compared by filter.source=clip filter.model=FOLDER, too."
        )
    return settings


def _name_scorer(settings: RankSettings) -> str:
    backend = settings.scoring.backend
    if backend == "transformers":
        return settings.model.title
    if backend == "http":
        return f"{settings.server.model or 'the model'} at {settings.server.base_url}"
    return f"{settings.filter.source} features alone, no model" if backend == "features" else backend


def _list_files(folder: Path) -> list[str]:
    """Return the image files below a folder, also through links, each folder once; hidden ones are left out."""
    files: list[str] = []
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            own = [name for name in sorted(names) if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != "."]
            files += [Path(parent, name).relative_to(folder).as_posix() for name in own]
        seen.add(real)
    return files


def _read_gallery(folder: Path) -> tuple[list[ImageRecord], dict[str, str]]:
    """Return a record of each image below a folder, and what is wrong with the others; every one is decoded."""

    def read(path: str) -> ImageRecord | str:
        if path != make_printable(path):
            return f"{make_printable(path)}: the name is not UTF-8, or cannot be shown. Rename the file."
        try:
            return _make_record(folder / path, path)
        except DataError as error:
            return str(error)

    files = _list_files(folder)
    with ThreadPoolExecutor(THREADS) as pool:
        read_files = dict(zip(files, pool.map(read, files), strict=True))
    records = [one for one in read_files.values() if isinstance(one, ImageRecord)]
    return records, {make_printable(path): one for path, one in read_files.items() if isinstance(one, str)}


def _make_record(file: Path, path: str) -> ImageRecord:
    width, height = open_crop(file).size
    return ImageRecord(path, "search", "gallery", path, "", "", width, height)


def _read_photo(image: Path) -> ImageRecord:
    # An absolute path is taken as it is, whatever folder the gallery lies in; its id is that of no gallery image.
    return _make_record(image, str(image.resolve()))


def _score(settings: RankSettings, plan: Plan, query: Query, models: Models) -> tuple[ScoreArray, ScoreArray | None]:
    """Return the scores (K,) of what the filter kept, fused if the settings say so, and all similarities (G,)."""
    candidates = plan.list_candidates(0)
    scorer = plan.scorer or make_scorer(settings, plan.protocol, plan.name_features(), models)
    scorer.prepare([query], candidates, plan.list_images())
    scores = score_query(settings.scoring, "folder", scorer, query, candidates)
    confidence = "top_logprobs" if scorer.filled and scorer.confidence == "margins" else scorer.confidence
    fused = fuse_scores(settings.scoring, plan, [[scores]], confidence)[0][0]
    similarities = plan.iterate_similarities()
    return fused, None if similarities is None else next(similarities)
