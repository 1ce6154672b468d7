"""The statistics of built data sets: what was counted beside what the recipe intends, as numbers and as a table.

``chatreid stats``: ``dataset_counts`` reads the shards, ``expectations`` judges, ``statistics_page`` draws.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ...config import BuildSettings
from ...errors import DataError
from ...tasks import LETTER_KINDS
from ..built_datasets import BuiltDataset, list_datasets, read_build_settings
from .counts import DatasetCounts, IntArray, count_datasets
from .expectations import (
    Comparison,
    compare,
    compare_yes_no,
    compute_gallery_probabilities,
    compute_match_probabilities,
    find_smallest_matches,
)
from .identities import IdentityStatistics, measure_identities


# A merged patch more or less does not matter; 32 tokens draw a smooth histogram.
TOKEN_BIN = 32


@dataclass(frozen=True, slots=True)
class TokenSummary:
    """Lengths in tokens.

    Attributes:
        mean: over the records.
        median: half of the records are not longer.
        p99: 99 of 100 records are not longer.
        largest: of all records.
        bins: smallest length of a bin of 32 -> number of records.
    """

    mean: float
    median: int
    p99: int
    largest: int
    bins: dict[int, int]


@dataclass(frozen=True, slots=True)
class DatasetStatistics:
    """One built data set.

    Attributes:
        task: of its records.
        stage: the stage that trains it.
        records: how many there are.
        share: of the stage's records, those of identities that are held out apart.
        intended_share: by the recipe's ratios, over the tasks that were built.
        gallery_sizes: N against uniform; None for tasks without a gallery.
        matches: n against equation 1; None for tasks that do not draw it.
        yes_no: yes (1) and no (0) against half each; None for other answers.
        visual_tokens: of all images, exact under the stage's policy.
        tokens: of the whole sequence, those of the text estimated.
        cutoff_len: the recipe's limit.
        above_cutoff: records that are estimated to be longer.
        sources: data set that the query comes from -> records.
        variants: wording of the prompt -> records.
        turns: number of questions -> records; of a dialogue 2 or 3.
        unknown_sizes: images without width and height, counted as 0 tokens.
    """

    task: str
    stage: int
    records: int
    share: float
    intended_share: float
    gallery_sizes: Comparison | None
    matches: Comparison | None
    yes_no: Comparison | None
    visual_tokens: TokenSummary
    tokens: TokenSummary
    cutoff_len: int
    above_cutoff: int
    sources: dict[str, int]
    variants: dict[int, int]
    turns: dict[int, int]
    unknown_sizes: int


@dataclass(frozen=True, slots=True)
class Statistics:
    """All data sets of a folder.

    Attributes:
        dataset_dir: the folder.
        records: in all of them.
        stages: stage -> records.
        datasets: name -> its statistics.
        left_out: name -> why there are none.
        identities: source -> its identities.
        identities_left_out: source -> why there are none.
    """

    dataset_dir: str
    records: int
    stages: dict[int, int]
    datasets: dict[str, DatasetStatistics]
    left_out: dict[str, str]
    identities: dict[str, IdentityStatistics]
    identities_left_out: dict[str, str]

    def to_json(self) -> str:
        """Return the numbers as JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    def render(self) -> str:
        """Return the most important numbers as a table."""
        columns = f"{'records':>11}{'share':>8}{'meant':>8}{'tokens: median':>16}{'99 %':>7}{'longest':>9}"
        lines = [f"{'data set':<46}{columns}"]
        for name, one in self.datasets.items():
            lines.append(
                f"{name:<46}{one.records:>11,}{one.share:>8.1%}{one.intended_share:>8.1%}"
                f"{one.tokens.median:>16,}{one.tokens.p99:>7,}{one.tokens.largest:>9,}"
            )
            for title, found in list_comparisons(one):
                p_value = "" if found.p_value is None else f" (p = {found.p_value:.3g})"
                lines.append(f"  {title}: {found.verdict}{p_value}")
            if set(one.turns) - {1}:
                lines.append("  turns: " + ", ".join(f"{number} in {count:,}" for number, count in one.turns.items()))
        lines += [f"{name}: left out, {why}" for name, why in (self.left_out | self.identities_left_out).items()]
        return "\n".join(lines)


def list_comparisons(dataset: DatasetStatistics) -> list[tuple[str, Comparison]]:
    """Return the comparisons that a data set's task allows, each with a title."""
    titled = (
        ("gallery size N", dataset.gallery_sizes),
        ("matches n", dataset.matches),
        ("yes and no", dataset.yes_no),
    )
    return [(title, found) for title, found in titled if found is not None]


def compute_statistics(dataset_dir: Path) -> Statistics:
    """Read every built data set of a folder once and compare it with its recipe.

    Raises:
        DataError: the folder holds no built data set, a shard or manifest is damaged, or no recipe is left.
    """
    datasets: list[BuiltDataset] = []
    recipes: list[BuildSettings] = []
    left_out: dict[str, str] = {}
    for dataset in list_datasets(dataset_dir):
        try:
            recipes.append(read_build_settings(dataset))
            datasets.append(dataset)
        except DataError as error:
            left_out[dataset.name] = str(error)
    if not datasets:
        raise DataError(next(iter(left_out.values())))
    described = _describe_datasets(datasets, recipes, count_datasets(datasets))
    identities, identities_left_out = measure_identities(recipes)
    stages = sorted({one.stage for one in described.values()})
    return Statistics(
        dataset_dir=str(dataset_dir),
        records=sum(one.records for one in described.values()),
        stages={stage: sum(one.records for one in described.values() if one.stage == stage) for stage in stages},
        datasets=described,
        left_out=left_out,
        identities=identities,
        identities_left_out=identities_left_out,
    )


def _find_weight(dataset: BuiltDataset, settings: BuildSettings) -> float:
    """Return the task's weight among those of its stage; Stage 1 has one task."""
    if dataset.stage == 1:
        return 1.0
    ratios = settings.stage2_ratios if dataset.stage == 2 else settings.stage3_ratios
    return ratios.get(dataset.task.name, 0.0)


def _describe_datasets(
    datasets: Sequence[BuiltDataset], recipes: Sequence[BuildSettings], counted: Sequence[DatasetCounts]
) -> dict[str, DatasetStatistics]:
    # Held out identities have a mix of their own.
    records: dict[tuple[int, bool], int] = {}
    weights: dict[tuple[int, bool], float] = {}
    for dataset, settings, counts in zip(datasets, recipes, counted, strict=True):
        stage = dataset.stage, dataset.held_out
        records[stage] = records.get(stage, 0) + counts.records
        weights[stage] = weights.get(stage, 0.0) + _find_weight(dataset, settings)
    described: dict[str, DatasetStatistics] = {}
    for dataset, settings, counts in zip(datasets, recipes, counted, strict=True):
        stage = dataset.stage, dataset.held_out
        # All weights are 0 only if another recipe built the tasks since.
        intended = _find_weight(dataset, settings) / weights[stage] if weights[stage] else 0.0
        described[dataset.name] = _describe_dataset(
            dataset, settings, counts, counts.records / records[stage], intended
        )
    return described


def _describe_dataset(
    dataset: BuiltDataset, settings: BuildSettings, counts: DatasetCounts, share: float, intended_share: float
) -> DatasetStatistics:
    task, gallery = dataset.task, settings.gallery
    smallest = find_smallest_matches(task)
    sizes = compare(counts.gallery_sizes, compute_gallery_probabilities(gallery, smallest))
    return DatasetStatistics(
        task=task.name,
        stage=dataset.stage,
        records=counts.records,
        share=share,
        intended_share=intended_share,
        gallery_sizes=sizes if task.answer_kind in LETTER_KINDS else None,
        matches=None if smallest is None else compare(counts.matches, compute_match_probabilities(gallery, smallest)),
        yes_no=compare_yes_no(counts.right, counts.wrong) if task.answer_kind == "match" else None,
        visual_tokens=summarize_tokens(counts.visual_tokens),
        tokens=summarize_tokens(counts.tokens),
        cutoff_len=settings.cutoff_len,
        above_cutoff=int(counts.tokens[settings.cutoff_len + 1 :].sum()),
        sources=dict(sorted(counts.sources.items(), key=lambda item: -item[1])),
        variants={variant: int(count) for variant, count in enumerate(counts.variants) if count},
        turns={number: int(count) for number, count in enumerate(counts.turns) if count},
        unknown_sizes=counts.unknown_sizes,
    )


def summarize_tokens(counts: IntArray) -> TokenSummary:
    """Return the summary of lengths; ``counts`` gives the number of records by length, from 0, at least one record."""
    lengths = np.flatnonzero(counts)
    reached = np.cumsum(counts)
    binned = np.add.reduceat(counts, np.arange(0, len(counts), TOKEN_BIN))

    def find(share: float) -> int:
        return int(np.searchsorted(reached, share * reached[-1]))

    return TokenSummary(
        mean=float((lengths * counts[lengths]).sum() / reached[-1]),
        median=find(0.5),
        p99=find(0.99),
        largest=int(lengths[-1]),
        bins={length * TOKEN_BIN: int(count) for length, count in enumerate(binned) if count},
    )
