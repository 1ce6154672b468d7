"""One turn of a search, ranked by the evaluator's own parts: filter, questions, backend.

What marks do: a picture that is not the one leaves the list. A confirmed one is pinned to the top; the score of every
other picture is the mean of its scores for the query picture and for the confirmed ones. Both kinds move the filter's
query vector as Rocchio does, with the values of Manning, Raghavan and Schütze, "Introduction to Information
Retrieval" (2008), section 9.1.1.
"""

import io
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..archives import BoolArray, IntArray, ScoreArray, normalise
from ..config import check_settings
from ..datasets.benchmark import Benchmark, Query
from ..datasets.matching import label_benchmark
from ..errors import ConfigError, DataError
from ..eval.backends import make_scorer
from ..eval.backends.base import Confidence, Scorer
from ..eval.candidates import Plan
from ..eval.filter import ITEMS_PER_BATCH, extract_features, keep_similar, number_distinct
from ..eval.fusion import fuse_scores
from ..eval.questions import build_pair_prompt, combine_margins, name_scores, score_query
from ..eval.scores import hash_bytes, hash_file
from ..eval.settings import RankSettings, ScoringSettings
from ..pixels import open_crop
from ..records import ImageRecord
from ..shards import digest_file, open_atomically
from .gallery import Batch, Gallery, Index, Progress, list_gallery, read_gallery, read_time
from .turns import Turn


CONFIRMED_WEIGHT, OTHER_WEIGHT = 0.75, 0.15
# Confirmed pictures that ask beside the query picture: each costs as many questions as the filter keeps.
MOST_CONFIRMED = 3
# Of a source that is no model of ours; such sources are loaded once a block.
ITEMS_PER_BLOCK = 32 * ITEMS_PER_BATCH
PAIRS_PER_STEP = 32
MOST_KEPT_BYTES = 2 << 30
MOST_KNOWN_PAIRS = 1_000_000


@dataclass(frozen=True, slots=True)
class Ranked:
    """How a turn ranks the gallery.

    Attributes:
        order: places of what counts, best first: the confirmed, those with a score, what the filter left out.
        scores: of each place that the filter kept.
        similarities: (G,), the filter's; None where nothing orders the gallery before the model does.
        confidence: what the scores are (``results.json``).
        asked: pairs that the model was asked about.
        reused: pairs of which it had been asked before.
        encoded: images that had to be encoded.
        seconds: how long it took.
    """

    order: IntArray
    scores: Mapping[int, float]
    similarities: ScoreArray | None
    confidence: Confidence
    asked: int
    reused: int
    encoded: int
    seconds: float


class KnownPairs:
    """A scorer that asks another one about no pair twice, and says how far it is."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.asked = self.reused = 0
        self.progress: Callable[[], None] = lambda: None
        self._known: dict[tuple[str, ...], float] = {}

    @property
    def confidence(self) -> Confidence:
        """What the other one's scores are."""
        filled = self.scorer.filled and self.scorer.confidence == "margins"
        return "top_logprobs" if filled else self.scorer.confidence

    @property
    def filled(self) -> int:
        """The other one's."""
        return self.scorer.filled

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """The other one's."""
        return self.scorer.fingerprint

    def prepare(
        self, queries: Sequence[Query], gallery: Sequence[ImageRecord], planned: Sequence[ImageRecord] = ()
    ) -> None:
        """Let the other one prepare."""
        self.scorer.prepare(queries, gallery, planned)

    def score_pairs(self, query: Query, candidates: Sequence[ImageRecord], task: str) -> ScoreArray:
        """Return scores (K,), of new pairs in steps."""
        # What the question shows: one about two images does not hang on the words that a second one asks with.
        prompt = build_pair_prompt(query, task)
        shown = query.image.image_id if query.image is not None and prompt.image_count > 1 else ""
        asked = shown, *prompt.segments
        new = [record for record in candidates if (*asked, record.image_id) not in self._known]
        self.reused += len(candidates) - len(new)
        if len(self._known) + len(new) > MOST_KNOWN_PAIRS:
            kept = {(*asked, record.image_id) for record in candidates}
            self._known = {key: self._known[key] for key in kept if key in self._known}
        for start in range(0, len(new), PAIRS_PER_STEP):
            step = new[start : start + PAIRS_PER_STEP]
            found = self.scorer.score_pairs(query, step, task).tolist()
            self._known |= {(*asked, one.image_id): score for one, score in zip(step, found, strict=True)}
            self.asked += len(step)
            self.progress()
        return np.array([self._known[(*asked, record.image_id)] for record in candidates], dtype=np.float32)

    def choose(self, query: Query, windows: Sequence[Sequence[ImageRecord]], task: str) -> list[ScoreArray]:
        """Return each window's scores, always asked anew: they depend on who else is in it."""
        self.asked += len(windows)
        return self.scorer.choose(query, windows, task)


def make_settings(model: str | None, overrides: Sequence[str] = (), stage: int = 3) -> RankSettings:
    """Return the settings of a search.

    Args:
        model: checkpoint; None: the filter's features alone rank, or what ``overrides`` name.
        overrides: keys of eval/*.yaml.
        stage: whose image policy applies; 0 for none.

    Raises:
        ConfigError: a key is wrong, or belongs to data with labels.
    """
    values: dict[str, dict[str, Any]] = {
        "model": {"chatreid_stage": stage or None, "model_name_or_path": model},
        "filter": {"tau": -1, "source": "colour" if model is None else "vlm"},
        "scoring": {} if model is not None else {"backend": "features"},
    }
    settings = check_settings(values, overrides, RankSettings, "chatreid search")
    if settings.filter.tau == "auto":
        raise ConfigError(
            "filter.tau: auto needs training identities, and a gallery has none; set it to a number, or leave it."
        )
    if settings.filter.source == "npz":
        raise ConfigError("filter.source: npz has no features of the picture you ask with; choose another source.")
    scoring = settings.scoring
    if scoring.reads_scores or scoring.backend in ("oracle", "random"):
        raise ConfigError(
            f"scoring.backend: {scoring.backend} knows nothing of your images; give --model, or leave it out."
        )
    return settings


class Searcher:
    """A gallery with its index, and whoever ranks it.

    Attributes:
        settings: as an evaluation's.
        gallery: what is searched.
        folder: of the indices, the pictures that were asked with, and the log.
        features: the filter's (G, D); None with ``filter.source: none``.
        pairs: asks the model, and knows its answers; None without one.
    """

    def __init__(
        self,
        source: Path,
        settings: RankSettings,
        folder: Path | None = None,
        progress: Progress = lambda done, count: None,
    ) -> None:
        """Read the gallery, load the model, and compute what the index lacks.

        Args:
            source: a folder, a list or a manifest.
            settings: who ranks, and how.
            folder: where the index is kept; None: beside the source.
            progress: of indexing; may raise to stop.

        Raises:
            ConfigError, UpstreamError: see ``make_scorer``.
            DataError: no image can be read, or the index cannot be written.
        """
        self.settings = settings
        listing = list_gallery(source)
        self.folder = folder or source.resolve().with_name(f"{source.resolve().name}.chatreid")
        self._root = listing.root
        self._pictures: dict[str, ImageRecord] = {}
        self._vectors: dict[str, ScoreArray] = {}
        self.pairs: KnownPairs | None = None
        if settings.scoring.asks_model:
            self.pairs = KnownPairs(make_scorer(settings, Benchmark("search", "", [], [], listing.root)))
        # The model itself, where it runs in this process.
        self._local: Any = self.pairs.scorer if self.pairs and settings.scoring.backend == "transformers" else None
        self.index = Index(self.folder, self._describe_maker())
        self.gallery: Gallery = read_gallery(source, listing, self.index.sizes)
        if any(record.image_id not in self.index for record in self.gallery.records):
            self.index.add(self.gallery.records, self._compute, progress)
        has_features = settings.filter.source != "none"
        self.features = self.index.take_features(self.gallery.places) if has_features else None
        same = number_distinct(() if self.features is None else self.features)
        self._firsts, self._repeated = np.unique(same, return_inverse=True)

    def _describe_maker(self) -> dict[str, Any]:
        """Return all that the bytes of an index depend on besides the images."""
        own, model = self.settings.filter, self.settings.model
        made_by: dict[str, Any] = {"version": 1, "source": own.source, "model": own.model}
        made_by["weights"] = None if own.weights is None else digest_file(own.weights)
        if self._local is not None:
            known = self._local.fingerprint
            made_by |= {key: known[key] for key in ("weights", "configuration")} | {"dtype": model.dtype}
            made_by["policy"] = [model.policy.stage, model.policy.aspect]
            made_by["pixels"] = [model.image_max_pixels, model.image_min_pixels]
        return made_by

    def _compute(self, records: Sequence[ImageRecord]) -> Iterator[Batch]:
        """Yield batches with what the index keeps of them; always the same batches of the same records."""
        if self._local is None:
            for start in range(0, len(records), ITEMS_PER_BLOCK):
                block = records[start : start + ITEMS_PER_BLOCK]
                yield block, self._extract(block), None
            return
        encoder = self._local.features
        for batch, pooled in self._local.stream_pooled(encoder.form_batches(records)):
            yield batch, self._extract(batch, pooled), [encoder.store(record.image_id) for record in batch]

    def _extract(self, items: Sequence[ImageRecord | str], pooled: ScoreArray | None = None) -> ScoreArray:
        """Return the filter's features (N, D), L2-normalised; ``pooled`` are the model's own."""
        source = self.settings.filter.source
        if source == "none":
            return np.empty((len(items), 0), dtype=np.float32)
        if source == "vlm" and pooled is not None:
            return normalise(pooled)
        return extract_features(items, self._root, self.settings.filter, self.settings.model.device)

    def take_picture(self, file: Path, box: tuple[int, int, int, int] | None = None) -> str:
        """Return the content hash of a picture to search for; one that is not in the gallery is kept as PNG.

        Args:
            file: the picture.
            box: left, top, width and height of the person in it, in pixels of the upright picture.

        Raises:
            DataError: it cannot be read, or the box is not inside it.
        """
        digest = "" if box else hash_file(file)
        if digest in self.gallery.places:
            return digest
        picture = open_crop(file)
        if box is not None:
            left, top, width, height = box
            if (
                min(left, top) < 0
                or min(width, height) < 1
                or left + width > picture.width
                or top + height > picture.height
            ):
                raise DataError(f"{file}: the box {box} is not inside its {picture.width} x {picture.height} pixels.")
            picture = picture.crop((left, top, left + width, top + height))
        return self.keep_picture(picture)

    def keep_picture(self, picture: Image.Image) -> str:
        """Keep a picture to search for as a PNG under its own content hash, and return that."""
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        digest = hash_bytes(buffer.getvalue())
        with open_atomically(self.folder / "queries" / f"{digest}.png") as temporary:
            temporary.write_bytes(buffer.getvalue())
        return digest

    def find_record(self, image_id: str) -> ImageRecord:
        """Return a picture of the gallery (its path is below the root), or one that was asked with (absolute).

        Raises:
            DataError: there is none.
        """
        place = self.gallery.places.get(image_id)
        if place is not None:
            return self.gallery.images[place].record
        if image_id not in self._pictures:
            file = (self.folder / "queries" / f"{image_id}.png").resolve()
            if not file.is_file():
                raise DataError(
                    f"The picture {image_id} is neither in {self.gallery.source} nor among those asked with "
                    f"({file.parent}). Ask with another one."
                )
            size = open_crop(file).size
            self._pictures[image_id] = ImageRecord(image_id, "search", "query", str(file), "", "", *size)
        return self._pictures[image_id]

    def find_allowed(self, wanted: Turn, hidden: Collection[str] = ()) -> BoolArray:
        """Return the mask (G,) of the images that count: cameras, times, and what is not the one."""
        left_out = {*wanted.different, *hidden}
        limits = [read_time(text, "the time limit") if text else None for text in (wanted.after, wanted.before)]

        def counts(image_id: str, camera: str, taken: Any) -> bool:
            if image_id in left_out or (wanted.cameras and camera not in wanted.cameras):
                return False
            if limits == [None, None]:
                return True
            after, before = limits
            return taken is not None and (after is None or taken >= after) and (before is None or taken <= before)

        images = self.gallery.images
        found = (counts(one.record.image_id, one.record.camera_id, one.time) for one in images)
        return np.fromiter(found, dtype=np.bool_, count=len(images))

    def locate(self, wanted: Turn) -> ScoreArray | None:
        """Return the filter's query vector (D,), moved by the marks; None if nothing says where to look."""
        if self.features is None:
            return None
        vectors: list[ScoreArray] = []
        if wanted.image:
            vectors.append(self._find_vector(wanted.image))
        elif self.settings.filter.source == "clip" and (words := _join_words(wanted)):
            vectors.append(self._extract([words])[0])
        if confirmed := [self._find_vector(one) for one in wanted.same if one in self.gallery.places]:
            vectors.append(np.float32(CONFIRMED_WEIGHT) * np.mean(confirmed, axis=0))
        if not vectors:
            return None
        if others := [self._find_vector(one) for one in wanted.different if one in self.gallery.places]:
            vectors.append(np.float32(-OTHER_WEIGHT) * np.mean(others, axis=0))
        return normalise(np.sum(vectors, axis=0)[None])[0]

    def _find_vector(self, image_id: str) -> ScoreArray:
        place = self.gallery.places.get(image_id)
        if place is not None and self.features is not None:
            return self.features[place]
        if image_id not in self._vectors:
            record = self.find_record(image_id)
            pooled = self._local.pool_images([record]) if self._local is not None else None
            self._vectors[image_id] = self._extract([record], pooled)[0]
        return self._vectors[image_id]

    def rank(
        self, wanted: Turn, hidden: Collection[str] = (), progress: Progress = lambda done, count: None
    ) -> Ranked:
        """Rank the gallery.

        Args:
            wanted: all that is wanted.
            hidden: further images that do not count.
            progress: of the pairs that the model is asked about; may raise to stop, and nothing is asked again then.

        Raises:
            ConfigError: nothing is asked for, or words without a model that reads them.
            DataError: nothing is left by the limits.
        """
        start = time.monotonic()
        self._check(wanted)
        allowed = self.find_allowed(wanted, hidden)
        if not allowed.any():
            raise DataError("No picture is left by the cameras, the times and the marks; take one of them back.")
        pinned = [self.gallery.places[one] for one in wanted.same if one in self.gallery.places]
        pinned = [place for place in pinned if allowed[place]]
        allowed[pinned] = False
        vector, limits = self.locate(wanted), self.settings.filter
        similarities: ScoreArray | None = None
        if vector is None or self.features is None:
            kept = np.flatnonzero(allowed)
        else:
            similarities = self._compare(self.features, vector)
            kept = keep_similar(similarities, ~allowed, float(limits.tau), limits.top_k, limits.floor)
        scores, counts = self._score(wanted, kept, similarities, progress)
        ranked = kept[np.argsort(-scores, kind="stable")]
        allowed[kept] = False
        tail = np.flatnonzero(allowed)
        if similarities is not None:
            tail = tail[np.argsort(-similarities[tail], kind="stable")]
        order = np.concatenate([np.array(pinned, dtype=np.int64), ranked, tail])
        known = dict(zip(kept.tolist(), scores.tolist(), strict=True))
        return Ranked(order, known, similarities, self._name_scores(wanted), *counts, time.monotonic() - start)

    def _compare(self, features: ScoreArray, vector: ScoreArray) -> ScoreArray:
        """Return the similarities (G,); equal features are multiplied once, as ``iterate_similarities`` says why."""
        distinct = features if len(self._firsts) == len(features) else features[self._firsts]
        return (distinct @ vector)[self._repeated]

    def _check(self, wanted: Turn) -> None:
        words = _join_words(wanted)
        if not (wanted.image or words or any(one in self.gallery.places for one in wanted.same)):
            raise ConfigError("Nothing is searched for: give --image, --text, --attribute, or --use a hit.")
        # Of a picture and words the features would see the picture alone.
        if words and self.pairs is None and (wanted.image or self.settings.filter.source != "clip"):
            raise ConfigError(
                f"Words need --model: the features of filter.source: {self.settings.filter.source} compare images. "
                "Words alone can be compared by filter.source=clip filter.model=FOLDER, too."
            )

    def list_queries(self, wanted: Turn) -> list[Query]:
        """Return what each candidate is compared with; the mean of these scores counts."""
        confirmed = [one for one in wanted.same if one in self.gallery.places][-MOST_CONFIRMED:]
        images: list[str] = [
            *([wanted.image] if wanted.image else []),
            *(one for one in confirmed if one != wanted.image),
        ]
        if not images:
            return [Query("words", "", text=wanted.text)] if wanted.text else []
        return [Query(one, "", image=self.find_record(one), text=wanted.text) for one in images]

    def _score(
        self, wanted: Turn, kept: IntArray, similarities: ScoreArray | None, progress: Progress
    ) -> tuple[ScoreArray, tuple[int, int, int]]:
        """Return the scores (K,), and how many pairs were asked about and known, and how many images encoded."""
        pairs = self.pairs
        if pairs is None:
            known = similarities[kept] if similarities is not None else np.zeros(len(kept), dtype=np.float32)
            return known, (0, 0, 0)
        candidates = [self.gallery.images[place].record for place in kept.tolist()]
        queries = self.list_queries(wanted)
        attributes = Query("attributes", "", attributes=wanted.attributes) if wanted.attributes else None
        everything = [*queries, *([attributes] if attributes else [])]
        self.restore([*(one.image for one in queries if one.image is not None), *candidates])
        before = pairs.asked, pairs.reused, self._count_encoded()
        pairs.progress = lambda: progress(pairs.asked - before[0], len(candidates) * len(everything))
        pairs.prepare(everything, candidates)
        ask = partial(score_query, self._get_scoring(wanted), "folder", pairs)
        scores = np.mean([ask(query, candidates) for query in queries], axis=0) if queries else None
        if attributes is not None:
            read = ask(attributes, candidates)
            scores = read if scores is None else combine_margins(scores, read, wanted.weight)
        after = pairs.asked, pairs.reused, self._count_encoded()
        fused = self._fuse(np.asarray(scores, dtype=np.float32), kept, everything[0], wanted)
        counts = after[0] - before[0], after[1] - before[1], after[2] - before[2]
        return fused, counts

    def _fuse(self, scores: ScoreArray, kept: IntArray, query: Query, wanted: Turn) -> ScoreArray:
        vector = self.locate(wanted)
        if self.settings.scoring.fusion == "none" or vector is None or self.features is None:
            return scores
        benchmark = Benchmark("search", "", [query], self.gallery.records, self._root, "nothing")
        plan = Plan(benchmark, label_benchmark(benchmark), (vector[None], self.features), [[kept]], [kept])
        return fuse_scores(self._get_scoring(wanted), plan, [[scores]], self._name_scores(wanted))[0][0]

    def _get_scoring(self, wanted: Turn) -> ScoringSettings:
        scoring = self.settings.scoring
        return scoring if wanted.weight is None else scoring.model_copy(update={"text_weight": wanted.weight})

    def _name_scores(self, wanted: Turn) -> Confidence:
        """Return what the scores of this turn are."""
        if self.pairs is None:
            return "similarities"
        queries = self.list_queries(wanted)
        sums = bool(wanted.attributes and queries) and self.pairs.confidence == "margins"
        return "standardised" if sums else name_scores(self._get_scoring(wanted), queries, self.pairs.confidence)

    def restore(self, records: Sequence[ImageRecord]) -> None:
        """Give the model what the index keeps of images, so that they need not be encoded."""
        if self._local is None:
            return
        if self._local.kept_bytes > MOST_KEPT_BYTES:
            self._local.forget_images()
        for record in records:
            if record.image_id not in self._local.features:
                stored = self.index.read_vision(record.image_id)
                if stored is not None:
                    self._local.features.restore(record.image_id, stored)

    def _count_encoded(self) -> int:
        return len(self._local.features) if self._local is not None else 0

    @property
    def title(self) -> str:
        """Who ranks, for people."""
        settings, backend = self.settings, self.settings.scoring.backend
        if backend == "transformers":
            return settings.model.title
        if backend == "http":
            return f"{settings.server.model or 'the model'} at {settings.server.base_url}"
        return f"{settings.filter.source} features alone, no model"


def _join_words(wanted: Turn) -> str:
    return Query("words", "", text=wanted.text).words or Query("words", "", attributes=wanted.attributes).words
