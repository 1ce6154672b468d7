"""``chatreid stats``: what built data sets hold, beside what their recipe intends.

``compute_statistics`` counts the records of every shard column by column, puts beside them what the recipe draws of
gallery sizes, matches and answers, and adds from the manifests how many positives a person has. ``stats_page.py``
writes it down. Whether the sampler draws by the recipe's laws is for its tests to say, not for this command.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tqdm import tqdm

from ..config import BuildSettings, GallerySettings
from ..errors import DataError
from ..images import ImagePolicy, count_visual_tokens
from ..printing import render_table
from ..records import list_missing_columns
from ..shards import open_parquet, pc
from ..tasks import LETTER_KINDS, Task
from .builders import TOKENS_AROUND_IMAGE
from .manifests import find_manifest
from .sampler import compute_size_probabilities
from .show import BuiltDataset, list_datasets, read_build_settings


IntArray = npt.NDArray[np.int64]

BATCH_RECORDS = 65536
# Qwen2-VL's chat frame with the default system prompt, the marks that end both turns included.
FRAME_TOKENS = 21
# English takes about 4.5 characters a token; fewer here, as when records are built: no text is to be underestimated.
CHARACTERS_PER_TOKEN = 3
# ``The second caption: "". `` around a caption; ``: `` and ``, `` around an attribute; ``, `` after a letter.
CHARACTERS_AROUND_CAPTION = 24
CHARACTERS_AROUND_ATTRIBUTE = 4
CHARACTERS_PER_LETTER = 3
# What ends a turn and begins the next: eleven tokens at three characters each.
CHARACTERS_AROUND_TURN = 33
# A merged patch more or less does not matter; 32 tokens draw a smooth histogram.
TOKEN_BIN = 32
IDENTITY_COLUMNS = ["split", "person_id", "camera_id"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Counted against intended.

    Fewer matches than intended are no fault of the sampler where an identity has too few images, or where the token
    budget left some out.

    Attributes:
        counts: value -> number of records.
        expected: value -> number of records that the recipe intends.
    """

    counts: dict[int, int]
    expected: dict[int, float]

    @property
    def mean(self) -> float:
        """The mean of the values that were counted; of yes (1) and no (0) the share of yes."""
        return _average(self.counts)

    @property
    def expected_mean(self) -> float:
        """The mean that the recipe intends."""
        return _average(self.expected)


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

    def list_comparisons(self) -> list[tuple[str, Comparison]]:
        """Return the comparisons that the task allows, each with a title."""
        titled = (("gallery size N", self.gallery_sizes), ("matches n", self.matches), ("share of yes", self.yes_no))
        return [(title, found) for title, found in titled if found is not None]


@dataclass(frozen=True, slots=True)
class IdentityStatistics:
    """The training identities of one source.

    Attributes:
        images: number of training images.
        identities: number of people.
        cameras: number of cameras.
        images_per_identity: number of images -> identities that have so many.
        cameras_per_identity: number of cameras -> identities seen by so many.
        positives_per_image: images of the same identity from other cameras -> images that have so many.
    """

    images: int
    identities: int
    cameras: int
    images_per_identity: dict[int, int]
    cameras_per_identity: dict[int, int]
    positives_per_image: dict[int, int]


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
        """Return the most important numbers as tables."""
        columns = ("data set", "records", "share", "meant", "tokens: median", "99 %", "longest")
        rows = [
            (
                name,
                *(f"{one.records:,}", f"{one.share:.1%}", f"{one.intended_share:.1%}"),
                *(f"{length:,}" for length in (one.tokens.median, one.tokens.p99, one.tokens.largest)),
            )
            for name, one in self.datasets.items()
        ]
        tables = [render_table(columns, rows)]
        compared = [
            (name, title, f"{found.mean:.2f}", f"{found.expected_mean:.2f}")
            for name, one in self.datasets.items()
            for title, found in one.list_comparisons()
        ]
        if compared:
            tables.append(render_table(("data set", "mean of", "built", "meant"), compared, words=2))
        notes = [
            f"{name}: turns: " + ", ".join(f"{number} in {count:,}" for number, count in one.turns.items())
            for name, one in self.datasets.items()
            if set(one.turns) - {1}
        ]
        notes += [f"{name}: left out, {why}" for name, why in (self.left_out | self.identities_left_out).items()]
        return "\n\n".join(tables + (["\n".join(notes)] if notes else []))


@dataclass(slots=True)
class DatasetCounts:
    """What the records of a data set hold, as ``DatasetStatistics`` names it: value -> number of records.

    ``gallery_sizes`` and ``matches`` count every record, whatever its task; ``yes_no`` those that answer so.
    """

    gallery_sizes: Counter[int] = field(default_factory=Counter[int])
    matches: Counter[int] = field(default_factory=Counter[int])
    visual_tokens: Counter[int] = field(default_factory=Counter[int])
    tokens: Counter[int] = field(default_factory=Counter[int])
    variants: Counter[int] = field(default_factory=Counter[int])
    turns: Counter[int] = field(default_factory=Counter[int])
    yes_no: Counter[int] = field(default_factory=Counter[int])
    sources: Counter[str] = field(default_factory=Counter[str])
    unknown_sizes: int = 0


def compute_statistics(dataset_dir: Path) -> Statistics:
    """Read every built data set of a folder once and compare it with its recipe.

    Raises:
        DataError: the folder holds no built data set, a shard or manifest is damaged, or no recipe is left.
    """
    datasets: list[tuple[BuiltDataset, BuildSettings]] = []
    left_out: dict[str, str] = {}
    for dataset in list_datasets(dataset_dir):
        try:
            datasets.append((dataset, read_build_settings(dataset)))
        except DataError as error:
            left_out[dataset.name] = str(error)
    if not datasets:
        raise DataError(next(iter(left_out.values())))
    counted = count_datasets([dataset for dataset, _ in datasets])
    shares = _compare_shares(datasets)
    identities, identities_left_out = measure_identities([settings for _, settings in datasets])
    stages = sorted({dataset.stage for dataset, _ in datasets})
    return Statistics(
        dataset_dir=str(dataset_dir),
        records=sum(dataset.records for dataset, _ in datasets),
        stages={stage: sum(one.records for one, _ in datasets if one.stage == stage) for stage in stages},
        datasets={
            dataset.name: _describe_dataset(dataset, settings, counts, *share)
            for (dataset, settings), counts, share in zip(datasets, counted, shares, strict=True)
        },
        left_out=left_out,
        identities=identities,
        identities_left_out=identities_left_out,
    )


def _compare_shares(datasets: Sequence[tuple[BuiltDataset, BuildSettings]]) -> list[tuple[float, float]]:
    """Return each data set's share of its stage's records, built and intended."""
    # Held out identities have a mix of their own.
    records: defaultdict[tuple[int, bool], int] = defaultdict(int)
    weights: defaultdict[tuple[int, bool], float] = defaultdict(float)
    for dataset, settings in datasets:
        records[dataset.stage, dataset.held_out] += dataset.records
        weights[dataset.stage, dataset.held_out] += _find_weight(dataset, settings)
    shares: list[tuple[float, float]] = []
    for dataset, settings in datasets:
        mix = dataset.stage, dataset.held_out
        # All weights are 0 only if another recipe built the tasks since.
        intended = _find_weight(dataset, settings) / weights[mix] if weights[mix] else 0.0
        shares.append((dataset.records / records[mix], intended))
    return shares


def _find_weight(dataset: BuiltDataset, settings: BuildSettings) -> float:
    """Return the task's weight among those of its stage; Stage 1 has one task."""
    if dataset.stage == 1:
        return 1.0
    ratios = settings.stage2_ratios if dataset.stage == 2 else settings.stage3_ratios
    return ratios.get(dataset.task.name, 0.0)


def _describe_dataset(
    dataset: BuiltDataset, settings: BuildSettings, counts: DatasetCounts, share: float, intended_share: float
) -> DatasetStatistics:
    task, gallery = dataset.task, settings.gallery
    sizes, matches = compute_gallery_shares(task, gallery), compute_match_shares(task, gallery)
    return DatasetStatistics(
        task=task.name,
        stage=dataset.stage,
        records=dataset.records,
        share=share,
        intended_share=intended_share,
        gallery_sizes=compare(counts.gallery_sizes, sizes) if task.answer_kind in LETTER_KINDS else None,
        matches=compare(counts.matches, matches) if matches else None,
        # Half of the questions are to be answered by yes (paper section 3.1.2).
        yes_no=compare(counts.yes_no, {0: 0.5, 1: 0.5}) if task.answer_kind == "match" else None,
        visual_tokens=summarize_tokens(counts.visual_tokens),
        tokens=summarize_tokens(counts.tokens),
        cutoff_len=settings.cutoff_len,
        above_cutoff=sum(number for length, number in counts.tokens.items() if length > settings.cutoff_len),
        sources=dict(counts.sources.most_common()),
        variants=dict(sorted(counts.variants.items())),
        turns=dict(sorted(counts.turns.items())),
        unknown_sizes=counts.unknown_sizes,
    )


def summarize_tokens(counts: Mapping[int, int]) -> TokenSummary:
    """Return the summary of lengths; ``counts`` says how many records have each, one at least."""
    lengths, numbers = np.array(sorted(counts.items()), dtype=np.int64).T
    reached = np.cumsum(numbers)
    median, p99 = lengths[np.searchsorted(reached, np.array([0.5, 0.99]) * reached[-1])].tolist()
    bins: Counter[int] = Counter()
    for length, number in counts.items():
        bins[length // TOKEN_BIN * TOKEN_BIN] += number
    return TokenSummary(
        mean=_average(counts),
        median=median,
        p99=p99,
        largest=int(lengths[-1]),
        bins=dict(sorted(bins.items())),
    )


# ---- What the records hold ----


def count_datasets(datasets: Sequence[BuiltDataset]) -> list[DatasetCounts]:
    """Read the shards of all data sets once and return what each holds.

    No Python object is made per record, so that millions take minutes.

    Raises:
        DataError: a shard is damaged, lacks a column or holds records of another task.
    """
    every: list[DatasetCounts] = []
    with tqdm(total=sum(dataset.records for dataset in datasets), desc="statistics", unit="record") as progress:
        for dataset in datasets:
            counts = DatasetCounts()
            for shard in dataset.shards:
                for batch in _read_batches(shard):
                    _count_batch(counts, batch, dataset, shard)
                    progress.update(len(batch))
            every.append(counts)
    return every


def _read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Yield the columns that are counted; ids and image paths, more than half of all bytes, stay unread."""
    with open_parquet(path) as file:
        missing = list_missing_columns(file.schema_arrow.names)
        if missing:
            raise DataError(f"{path} lacks column(s) {', '.join(missing)}. Build it with `chatreid build`.")
        leaves = [file.metadata.schema.column(i).path for i in range(file.metadata.num_columns)]
        wanted = [
            leaf for leaf in leaves if leaf != "id" and not (leaf.startswith("images.") and leaf.endswith(".path"))
        ]
        yield from file.iter_batches(BATCH_RECORDS, columns=wanted)


def _count_batch(counts: DatasetCounts, batch: pa.RecordBatch, dataset: BuiltDataset, shard: Path) -> None:
    task = dataset.task
    others = [name for name in pc.unique(batch["task"]).to_pylist() if name != task.name]
    if others:
        raise DataError(f"{shard} mixes tasks {task.name} and {others[0]}; a data set has one. Build it again.")
    images = _measure_lists(batch["images"])
    galleries = images - _read_integers(batch["query_images"])
    if galleries.min(initial=0) < 0:
        raise DataError(f"{shard} has a record with fewer images than query_images. Build it again.")
    matches = _measure_lists(pc.struct_field(batch["answer"], "indices"))
    variants = _read_integers(batch["variant"])
    visual = _count_visual_tokens(counts, batch["images"], images, dataset.stage)
    further = _measure_lists(batch["turns"]) if "turns" in batch.schema.names else np.zeros(len(batch), dtype=np.int64)
    characters = _count_characters(batch, task, variants, matches)
    if further.any():
        characters += _count_further_characters(batch["turns"], task, further)
    text = characters // CHARACTERS_PER_TOKEN + 1
    counts.gallery_sizes += _count_values(galleries)
    counts.matches += _count_values(matches)
    counts.visual_tokens += _count_values(visual)
    counts.tokens += _count_values(visual + TOKENS_AROUND_IMAGE * images + text + FRAME_TOKENS)
    counts.variants += _count_values(variants)
    counts.turns += _count_values(further + 1)
    counts.yes_no += _count_values(pc.drop_null(pc.struct_field(batch["answer"], "match").cast(pa.int64())))
    for name, number in _count_values(batch["dataset"]).items():
        counts.sources[name or "unknown"] += number


def _count_values(values: IntArray | pa.Array) -> Counter[Any]:
    """Return value -> how often it occurs."""
    found = pc.value_counts(pa.array(values) if isinstance(values, np.ndarray) else values)
    return Counter(dict(zip(found.field("values").to_pylist(), found.field("counts").to_pylist(), strict=True)))


def _read_integers(array: pa.Array) -> IntArray:
    return pc.fill_null(array, 0).to_numpy(zero_copy_only=False).astype(np.int64)


def _measure_lists(lists: pa.Array) -> IntArray:
    """Return the number of items of each list, 0 for none."""
    return _read_integers(pc.list_value_length(lists))


def _measure_texts(structs: pa.Array, *names: str) -> IntArray:
    """Return the characters of each struct's named texts together."""
    return sum(
        (_read_integers(pc.utf8_length(pc.struct_field(structs, name))) for name in names),
        np.zeros(len(structs), dtype=np.int64),
    )


def _sum_lists(values: IntArray, lengths: IntArray) -> IntArray:
    """Return the sum of each list's values; ``lengths`` says how many of the flat ``values`` each list has."""
    sums = np.concatenate([[0], np.cumsum(values)])
    ends = np.cumsum(lengths)
    return sums[ends] - sums[ends - lengths]


@lru_cache(maxsize=1 << 20)
def _count_image_tokens(width: int, height: int, stage: int) -> int:
    return count_visual_tokens(width, height, ImagePolicy(stage)) if width > 0 and height > 0 else 0


def _count_visual_tokens(counts: DatasetCounts, images: pa.Array, lengths: IntArray, stage: int) -> IntArray:
    """Return the visual tokens of each record; every size is looked up once a batch."""
    flat = images.flatten()
    widths, heights = (_read_integers(pc.struct_field(flat, name)) for name in ("width", "height"))
    sizes = pc.dictionary_encode(pa.array(widths << 32 | heights))
    known = [_count_image_tokens(size >> 32, size & 0xFFFFFFFF, stage) for size in sizes.dictionary.to_pylist()]
    counts.unknown_sizes += int(np.count_nonzero((widths <= 0) | (heights <= 0)))
    tokens = np.array(known, dtype=np.int64)[sizes.indices.to_numpy()]
    return _sum_lists(tokens, lengths)


def _count_characters(batch: pa.RecordBatch, task: Task, variants: IntArray, matches: IntArray) -> IntArray:
    """Return the characters of each record's prompt and answer, the wording's field names included."""
    wordings = np.array([len(prompt) for prompt in task.prompts], dtype=np.int64)
    characters = wordings[variants % len(wordings)] + len(task.answer_form) + CHARACTERS_PER_LETTER * matches
    characters += _measure_texts(batch["answer"], "text")
    captions, attributes = batch["captions"], batch["attributes"]
    lengths = _read_integers(pc.utf8_length(captions.flatten())) + CHARACTERS_AROUND_CAPTION
    characters += _sum_lists(lengths, _measure_lists(captions))
    lengths = _measure_texts(attributes.flatten(), "name", "value") + CHARACTERS_AROUND_ATTRIBUTE
    return characters + _sum_lists(lengths, _measure_lists(attributes))


def _count_further_characters(turns: pa.Array, task: Task, lengths: IntArray) -> IntArray:
    """Return the characters of each record's turns after the first, each with its longest wording."""
    flat = turns.flatten()
    characters = _measure_texts(flat, "caption", "name", "value")
    characters += CHARACTERS_PER_LETTER * _measure_lists(pc.struct_field(flat, "indices"))
    longest = max((len(wording) for wordings in task.follow_ups for wording in wordings), default=0)
    return _sum_lists(characters + longest + CHARACTERS_AROUND_ATTRIBUTE + CHARACTERS_AROUND_TURN, lengths)


# ---- What the recipe intends ----


def find_smallest_matches(task: Task) -> int | None:
    """Return the least n of a task that draws it (equation 1): 2 in Stage 2, 1 in Stage 3; None for other tasks.

    Sources: paper section 3.2 for Stage 2, section 3.1.3 for Stage 3. Text-to-image one-to-many has one right answer.
    """
    if task.answer_kind not in LETTER_KINDS:
        return None
    if 3 in task.stages:
        return 1
    return 2 if task.name == "image_to_image_many_to_many" else None


def compute_gallery_shares(task: Task, gallery: GallerySettings) -> dict[int, float]:
    """Return P(N) by N: uniform (paper section 3.2), or by the law of n where the task draws n."""
    smallest = find_smallest_matches(task)
    if smallest is None:
        return dict.fromkeys(
            range(gallery.min_size, gallery.max_size + 1), 1 / (gallery.max_size - gallery.min_size + 1)
        )
    rows = compute_size_probabilities(gallery.min_size, gallery.max_size, smallest, gallery.matches)
    return {size: sum(row) for size, row in enumerate(rows) if any(row)}


def compute_match_shares(task: Task, gallery: GallerySettings) -> dict[int, float]:
    """Return P(n) by n, over all gallery sizes; nothing where the task does not draw n."""
    smallest = find_smallest_matches(task)
    if smallest is None:
        return {}
    rows = compute_size_probabilities(gallery.min_size, gallery.max_size, smallest, gallery.matches)
    shares = {n: sum(row[n] for row in rows[n:]) for n in range(len(rows))}
    return {n: share for n, share in shares.items() if share}


def compare(counts: Mapping[int, int], shares: Mapping[int, float]) -> Comparison:
    """Put counted records beside those that ``shares``, value -> share, intend of as many."""
    total = sum(counts.values())
    values = sorted(counts.keys() | shares.keys())
    return Comparison(
        counts={value: counts.get(value, 0) for value in values},
        expected={value: round(shares.get(value, 0.0) * total, 2) for value in values},
    )


def _average(numbers: Mapping[int, float]) -> float:
    return sum(value * number for value, number in numbers.items()) / max(sum(numbers.values()), 1)


# ---- What the manifests hold ----


def measure_identities(recipes: Iterable[BuildSettings]) -> tuple[dict[str, IdentityStatistics], dict[str, str]]:
    """Return the statistics of every source that trains, and for those without a manifest the reason.

    Raises:
        DataError: a manifest is damaged.
    """
    found: dict[str, IdentityStatistics] = {}
    missing: dict[str, str] = {}
    for settings in recipes:
        for source in settings.sources:
            if not source.stages or source.name in found:
                continue
            path = find_manifest(settings, source.name)
            training = _read_training_images(path) if path.is_file() else None
            if training is None:
                missing[source.name] = f"no manifest {path}; run this where `chatreid build` ran"
            elif len(training) == 0:
                missing[source.name] = f"no training images in {path}"
            else:
                found[source.name] = _measure_identities(training)
    return found, missing


def _read_training_images(path: Path) -> pa.Table:
    """Return identity and camera of the training images; captions and hashes stay unread."""
    advice = "Make it again with `chatreid parse`."
    with open_parquet(path, advice) as file:
        table = file.read(columns=IDENTITY_COLUMNS)
    missing = [name for name in IDENTITY_COLUMNS if name not in table.column_names]
    if missing:
        raise DataError(f"{path} is not a manifest: it lacks {', '.join(missing)}. {advice}")
    return table.filter(pc.equal(table["split"], "train"))


def _measure_identities(training: pa.Table) -> IdentityStatistics:
    # One row for each identity and camera: from it follow the cameras, the images, and who has positives elsewhere.
    seen = training.group_by(["person_id", "camera_id"]).aggregate([("split", "count")])
    people = np.unique(seen["person_id"].to_numpy(), return_inverse=True)[1]
    taken = seen["split_count"].to_numpy().astype(np.int64)
    images = np.bincount(people, weights=taken).astype(np.int64)
    found = (images, np.bincount(people), np.repeat(images[people] - taken, taken))
    per_identity, cameras, positives = (dict(sorted(_count_values(values).items())) for values in found)
    return IdentityStatistics(
        images=len(training),
        identities=len(images),
        cameras=len(pc.unique(training["camera_id"])),
        images_per_identity=per_identity,
        cameras_per_identity=cameras,
        positives_per_image=positives,
    )
