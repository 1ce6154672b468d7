"""What is to be scored: the protocol's queries, and for each the gallery images that the baseline filter keeps."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..eval_settings import EvalSettings
from ..records import ImageRecord
from .filtering import extract_features, filter_gallery, iterate_similarities
from .modes import describe_cost
from .processes import Processes
from .protocols import Labels, Protocol, label_protocol, load_protocol
from .ties import IntArray


ScoreArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be scored: the candidates of each query, and the baseline they come from.

    ``query_features`` (Q, D) and ``gallery_features`` (G, D) are None without a filter; ``kept`` has Q index arrays.
    """

    protocol: Protocol
    labels: Labels
    query_features: ScoreArray | None
    gallery_features: ScoreArray | None
    kept: list[IntArray]

    def iterate_similarities(self) -> Iterator[ScoreArray]:
        """Yield each query's baseline similarities (G,); zeros without a filter, where no order is known."""
        if self.query_features is None or self.gallery_features is None:
            zeros = np.zeros(len(self.protocol.gallery), dtype=np.float32)
            return (zeros for _ in self.protocol.queries)
        return iterate_similarities(self.query_features, self.gallery_features)

    def list_candidates(self, query: int) -> list[ImageRecord]:
        """Return the gallery images to score for a query, in baseline order."""
        return [self.protocol.gallery[index] for index in self.kept[query].tolist()]


def make_plan(settings: EvalSettings, processes: Processes | None = None) -> Plan:
    """Load the protocol and run the filter; several processes share the work of extracting its features."""
    processes = processes or Processes()
    protocol = load_protocol(settings)
    labels = label_protocol(protocol)
    if settings.filter == "none":
        kept = [np.flatnonzero(~labels.find_ignored(query)) for query in range(len(protocol.queries))]
        return Plan(protocol, labels, None, None, kept)
    pictures = [query.image for query in protocol.queries if query.image is not None]
    records = [*pictures, *protocol.gallery]
    share = processes.take_share(records) if len(records) >= processes.count else records
    features = np.concatenate(processes.gather(extract_features(share, protocol.image_root, settings)))
    features = features[: len(records)]  # of fewer records than processes everyone took all
    count = len(protocol.queries)
    kept = filter_gallery(
        features[:count], features[count:], labels.find_ignored, settings.tau, settings.top_k, settings.floor
    )
    return Plan(protocol, labels, features[:count], features[count:], kept)


def describe_plan(settings: EvalSettings) -> str:
    """Say how much an evaluation would do; reads the manifest, extracts no features, writes nothing."""
    protocol = load_protocol(settings)
    gallery = len(protocol.gallery)
    most = gallery if settings.filter == "none" or settings.top_k is None else min(settings.top_k, gallery)
    return (
        f"{protocol.name} ({protocol.variant}): {len(protocol.queries):,} queries "
        f"({len(protocol.skipped):,} skipped), {gallery:,} gallery images, at most "
        f"{most * len(protocol.queries):,} pairs to score with backend {settings.backend}.\n"
        f"{describe_cost(settings, most, len(protocol.queries))}\n"
        f"Results would go to {settings.output_dir}. Nothing was written."
    )
