"""``filter.tau: auto``: the filter's threshold, found on the manifest's training identities.

Of a sample of training images those ask that look like the benchmark's queries, those are ranked that look like its
gallery, and its own rules say what matches; tau is the similarity that ``filter.recall`` of these matches reach.
People whom the model was trained on are more alike to it than strangers, so of the benchmark's own matches fewer may
be kept: the results say how many.

Where nothing can be calibrated there is no threshold and ``top_k`` alone decides, which keeps more and never less.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np

from ..archives import ScoreArray
from ..datasets.benchmark import Benchmark, Source
from ..datasets.matching import label_benchmark
from ..datasets.registry import list_benchmarks
from ..errors import DataError
from ..records import ImageRecord
from ..shards import read_manifest, read_manifest_provenance
from .distributed import Processes
from .filter import iterate_similarities
from .loader import apply_rules, check_images, get_variant
from .settings import DataSettings


# Of a benchmark's queries (Q, D) and of its gallery (G, D).
Extract = Callable[[Benchmark], tuple[ScoreArray, ScoreArray]]

logger = logging.getLogger(__name__)

# Market-1501's threshold then rests on 250 people; a GPU encodes as many images within a minute.
MOST_IMAGES = 2000
IMAGES_OF_A_PERSON = 8
NO_THRESHOLD = -1.0


@dataclass(frozen=True, slots=True)
class Calibration:
    """What ``tau: auto`` found, and on what.

    Attributes:
        tau: the threshold; -1, which keeps all, where none was found.
        recall: share of the matches that reach it.
        pairs: number of matches: pairs of a training image (or words) that asks and one that it should find.
        images: number of training images drawn, with ``data.seed``.
        identities: number of people on them.
        reason: why there is no threshold; empty if there is one.
    """

    tau: float = NO_THRESHOLD
    recall: float = 1.0
    pairs: int = 0
    images: int = 0
    identities: int = 0
    reason: str = ""

    def describe(self) -> str:
        """Return it in a line."""
        if self.reason:
            return f"tau: auto found no threshold, so top_k alone decides: {self.reason}"
        return (
            f"tau: auto found {self.tau:.4f}, which {100 * self.recall:.2f} % of {self.pairs:,} matches of training "
            f"identities reach ({self.identities:,} people on {self.images:,} images)"
        )


def calibrate(
    data: DataSettings,
    recall: float,
    benchmark: Benchmark,
    processes: Processes,
    extract: Extract,
    *,
    opens_images: bool = True,
) -> Calibration:
    """Return the threshold for a benchmark; the same in every process, which each compute it.

    Args:
        data: the evaluation's section.
        recall: ``filter.recall``.
        benchmark: the benchmark, whose queries and gallery the training images have to look like.
        processes: the first one's threshold counts.
        extract: gives the filter's features, without other processes: shares would have to meet again.
        opens_images: whether the images are needed.

    Raises:
        ConfigError: see ``extract_features``.
        UpstreamError: the device has no memory for one image.
    """
    try:
        found = _calibrate(load_training(data, benchmark, opens_images=opens_images), data.manifest, recall, extract)
    except DataError as error:
        # Without the names of the files that are missing.
        found = Calibration(reason=str(error).partition("\n")[0].rstrip(":.") + ".")
    found = processes.gather(found)[0]
    if processes.is_first:
        logger.warning("%s", found.describe())
    return found


def load_training(data: DataSettings, benchmark: Benchmark, *, opens_images: bool = True) -> Benchmark:
    """Return the benchmark as it would be, were it made of a sample of the manifest's training images.

    Raises:
        DataError: there are none like the benchmark's, their files are missing, or they lack its labels.
    """
    provenance = read_manifest_provenance(data.manifest)
    records = [record for record in read_manifest(data.manifest)[0] if record.split == "train"]
    if not records:
        raise DataError(f"{data.manifest} has no images of split train.")
    pictures = [query.image for query in benchmark.queries if query.image is not None]
    asking, ranked = (_find_alike(records, side) for side in (pictures, benchmark.gallery))
    drawn = {record.image_id for record in draw_sample([*asking, *ranked], data.seed)}
    sides = [[record for record in side if record.image_id in drawn] for side in (asking, ranked)]
    if opens_images:
        check_images([*sides[0], *sides[1]], benchmark.image_root)
    notes = provenance.get("protocol") or {}
    variant = get_variant(provenance)
    source = Source(data.benchmark, data.manifest, sides[0], sides[1], benchmark.image_root, variant, notes)
    # All that is ranked at once: trials, and the people that a setting keeps, are those of the test set.
    changes = {"trials": 1, "restrict": False, **list_benchmarks()[data.benchmark].training}
    training = apply_rules(data, source, **changes)
    return replace(training, trials=(), ignore_copies=data.ignore_copies)


def _find_alike(records: Sequence[ImageRecord], like: Sequence[ImageRecord]) -> list[ImageRecord]:
    """Return the records of the modalities and cameras of others; of their modalities alone if no camera is theirs."""
    cameras = {(record.modality, record.camera_id) for record in like}
    modalities = {record.modality for record in like}
    alike = [record for record in records if (record.modality, record.camera_id) in cameras]
    return alike or [record for record in records if record.modality in modalities]


def draw_sample(records: Iterable[ImageRecord], seed: int, most: int = MOST_IMAGES) -> list[ImageRecord]:
    """Return up to eight random images of each of as many random people as ``most`` images show."""
    images: defaultdict[str, dict[str, ImageRecord]] = defaultdict(dict)
    for record in records:
        images[record.person_id][record.image_id] = record
    random, drawn = Random(seed), list[ImageRecord]()
    for person in random.sample(sorted(images), len(images)):
        own = list(images[person].values())
        drawn += random.sample(own, min(IMAGES_OF_A_PERSON, len(own)))
        if len(drawn) >= most:
            break
    return drawn[:most]


def _calibrate(training: Benchmark, manifest: Path, recall: float, extract: Extract) -> Calibration:
    asked, ranked = extract(training)
    found = list(_iterate_matches(training, asked, ranked))
    if not found:
        raise DataError(f"{manifest}: no training image drawn has a match ({training.variant}).")
    similarities = np.sort(np.concatenate(found))
    # A hair more, since 1 - 0.99 is a hair less than a hundredth.
    tau = similarities[math.floor((1 - recall) * len(similarities) + 1e-9)]
    images = {record.image_id: record for record in training.gallery}
    images |= {query.image.image_id: query.image for query in training.queries if query.image is not None}
    return Calibration(
        max(NO_THRESHOLD, float(tau)),
        float(np.mean(similarities >= tau)),
        len(similarities),
        len(images),
        len({record.person_id for record in images.values()}),
    )


def _iterate_matches(training: Benchmark, asked: ScoreArray, ranked: ScoreArray) -> Iterator[ScoreArray]:
    """Yield the similarities of each query that has matches to them; an image is no match of itself."""
    labels = label_benchmark(training)
    for number, similarities in enumerate(iterate_similarities(asked, ranked)):
        own = training.queries[number].image
        matches = [
            place
            for place in labels.list_positives(number).tolist()
            if own is None or training.gallery[place].image_id != own.image_id
        ]
        if matches:
            yield similarities[matches]
