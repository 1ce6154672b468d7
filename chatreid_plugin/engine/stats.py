"""``chatreid stats``: what built data sets hold, beside what their recipe intends.

``compute_statistics`` counts the records of every shard column by column, puts beside them what the recipe draws of
gallery sizes, matches and answers, and adds from the manifests how many positives a person has. ``stats_page.py``
writes it down. Whether the sampler draws by the recipe's laws is for its tests to say, not for this command.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
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
        return average(self.counts)

    @property
    def expected_mean(self) -> float:
        """The mean that the recipe intends."""
        return average(self.expected)


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
    stages = Counter[int]()
    described: dict[str, DatasetStatistics] = {}
    with tqdm(total=sum(dataset.records for dataset, _ in datasets), desc="statistics", unit="record") as progress:
        for dataset, settings in datasets:
            # Identities that are held out have a mix of their own.
            mix = [
                (one, recipe)
                for one, recipe in datasets
                if (one.stage, one.held_out) == (dataset.stage, dataset.held_out)
            ]
            # All weights are 0 only if another recipe built the tasks since.
            weight = _find_weight(dataset, settings) / (sum(_find_weight(*one) for one in mix) or 1.0)
            share = dataset.records / sum(one.records for one, _ in mix)
            described[dataset.name] = _describe_dataset(dataset, settings, measure_records(dataset), share, weight)
            stages[dataset.stage] += dataset.records
            progress.update(dataset.records)
    identities, identities_left_out = measure_identities([settings for _, settings in datasets])
    return Statistics(
        dataset_dir=str(dataset_dir),
        records=stages.total(),
        stages=dict(sorted(stages.items())),
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


def _describe_dataset(
    dataset: BuiltDataset, settings: BuildSettings, records: pa.Table, share: float, intended_share: float
) -> DatasetStatistics:
    task = dataset.task
    sizes, matches = compute_gallery_shares(task, settings.gallery), compute_match_shares(task, settings.gallery)
    tokens = records["tokens"].to_numpy()
    sources = count_values(records["source"])
    return DatasetStatistics(
        task=task.name,
        stage=dataset.stage,
        records=dataset.records,
        share=share,
        intended_share=intended_share,
        gallery_sizes=compare(records["gallery"], sizes) if task.answer_kind in LETTER_KINDS else None,
        matches=compare(records["matches"], matches) if matches else None,
        # Half of the questions are to be answered by yes (paper section 3.1.2).
        yes_no=compare(records["yes"], {0: 0.5, 1: 0.5}) if task.answer_kind == "match" else None,
        visual_tokens=summarize_tokens(records["visual_tokens"].to_numpy()),
        tokens=summarize_tokens(tokens),
        cutoff_len=settings.cutoff_len,
        above_cutoff=int(np.count_nonzero(tokens > settings.cutoff_len)),
        sources=dict(sorted(sources.items(), key=lambda item: -item[1])),
        variants=count_values(records["variant"]),
        turns=count_values(records["turns"]),
        unknown_sizes=pc.sum(records["unknown_sizes"]).as_py(),
    )


def summarize_tokens(lengths: IntArray) -> TokenSummary:
    """Return the summary of the records' lengths, one at least."""
    median, p99 = np.quantile(lengths, [0.5, 0.99], method="inverted_cdf").tolist()
    return TokenSummary(
        mean=int(lengths.sum()) / len(lengths),
        median=median,
        p99=p99,
        largest=int(lengths.max()),
        bins=count_values(pa.array(lengths // TOKEN_BIN * TOKEN_BIN)),
    )


def count_values(values: pa.Array) -> dict[Any, int]:
    """Return value -> how often it occurs, null apart, in the values' order."""
    found = pc.value_counts(pc.drop_null(values))
    return dict(sorted((one["values"], one["counts"]) for one in found.to_pylist()))


# ---- What the records hold ----


def measure_records(dataset: BuiltDataset) -> pa.Table:
    """Return what is counted of each record of a data set, in columns.

    They are ``gallery`` (its size), ``matches`` (right answers by letter), ``yes`` (1 or 0; null for other answers),
    ``visual_tokens``, ``tokens`` (of the whole sequence), ``variant``, ``turns``, ``source``, and ``unknown_sizes``
    (images without one). No Python object is made per record, so that millions take minutes.

    Raises:
        DataError: a shard is damaged, lacks a column or holds records of another task.
    """
    batches = (_measure_batch(batch, dataset, shard) for shard in dataset.shards for batch in _read_batches(shard))
    return pa.concat_tables(batches).combine_chunks()


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


def _measure_batch(batch: pa.RecordBatch, dataset: BuiltDataset, shard: Path) -> pa.Table:
    task = dataset.task
    others = [name for name in pc.unique(batch["task"]).to_pylist() if name != task.name]
    if others:
        raise DataError(f"{shard} mixes tasks {task.name} and {others[0]}; a data set has one. Build it again.")
    images, answer = batch["images"], batch["answer"]
    shown = _measure_lists(images)
    gallery = shown - _read_integers(batch["query_images"])
    if gallery.min(initial=0) < 0:
        raise DataError(f"{shard} has a record with fewer images than query_images. Build it again.")
    matches, variants = _measure_lists(pc.struct_field(answer, "indices")), _read_integers(batch["variant"])
    widths, heights = (_read_integers(pc.struct_field(images.flatten(), name)) for name in ("width", "height"))
    visual = _sum_lists(images, _count_visual_tokens(widths, heights, dataset.stage))
    characters = _count_characters(batch, task)
    characters += np.array([len(prompt) for prompt in task.prompts])[variants % len(task.prompts)]
    characters += CHARACTERS_PER_LETTER * matches
    further = np.zeros(len(batch), dtype=np.int64)
    if "turns" in batch.schema.names:
        further = _measure_lists(batch["turns"])
        characters += _count_further_characters(batch["turns"], task)
    return pa.table(
        {
            "gallery": gallery,
            "matches": matches,
            "yes": pc.struct_field(answer, "match").cast(pa.int64()),
            "visual_tokens": visual,
            "tokens": visual + TOKENS_AROUND_IMAGE * shown + characters // CHARACTERS_PER_TOKEN + 1 + FRAME_TOKENS,
            "variant": variants,
            "turns": further + 1,
            "source": pc.if_else(pc.equal(pc.fill_null(batch["dataset"], ""), ""), "unknown", batch["dataset"]),
            "unknown_sizes": _sum_lists(images, (widths <= 0) | (heights <= 0)),
        }
    )


def _read_integers(array: pa.Array) -> IntArray:
    return pc.fill_null(array, 0).to_numpy(zero_copy_only=False).astype(np.int64)


def _measure_lists(lists: pa.Array) -> IntArray:
    """Return the number of items of each list, 0 for none."""
    return _read_integers(pc.list_value_length(lists))


def _sum_lists(lists: pa.Array, values: npt.NDArray[Any]) -> IntArray:
    """Return the sum of each list's values, which stand one after another in ``values``."""
    owners = pc.list_parent_indices(lists).to_numpy()
    return np.bincount(owners, weights=values, minlength=len(lists)).astype(np.int64)


def _measure_texts(structs: pa.Array, *names: str) -> IntArray:
    """Return the characters of each struct's named texts together."""
    lengths = (_read_integers(pc.utf8_length(pc.struct_field(structs, name))) for name in names)
    return sum(lengths, np.zeros(len(structs), dtype=np.int64))


def _count_visual_tokens(widths: IntArray, heights: IntArray, stage: int) -> IntArray:
    """Return the visual tokens of each image, 0 where its size is unknown; every size is looked up once."""
    sizes, places = np.unique(widths << 32 | heights, return_inverse=True)
    policy = ImagePolicy(stage)
    known = [(size >> 32, size & 0xFFFFFFFF) for size in sizes.tolist()]
    counts = [count_visual_tokens(*size, policy) if min(size) > 0 else 0 for size in known]
    return np.array(counts, dtype=np.int64)[places]


def _count_characters(batch: pa.RecordBatch, task: Task) -> IntArray:
    """Return the characters of each record's captions, attributes and answer in words."""
    captions, attributes = batch["captions"], batch["attributes"]
    quoted = _read_integers(pc.utf8_length(captions.flatten())) + CHARACTERS_AROUND_CAPTION
    named = _measure_texts(attributes.flatten(), "name", "value") + CHARACTERS_AROUND_ATTRIBUTE
    said = _measure_texts(batch["answer"], "text") + len(task.answer_form)
    return said + _sum_lists(captions, quoted) + _sum_lists(attributes, named)


def _count_further_characters(turns: pa.Array, task: Task) -> IntArray:
    """Return the characters of each record's turns after the first, each with its longest wording."""
    flat = turns.flatten()
    longest = max((len(wording) for wordings in task.follow_ups for wording in wordings), default=0)
    characters = _measure_texts(flat, "caption", "name", "value") + longest + CHARACTERS_AROUND_ATTRIBUTE
    characters += CHARACTERS_PER_LETTER * _measure_lists(pc.struct_field(flat, "indices")) + CHARACTERS_AROUND_TURN
    return _sum_lists(turns, characters)


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


def compare(found: pa.Array, shares: Mapping[int, float]) -> Comparison:
    """Put records' values beside those that ``shares``, value -> share, intend of as many."""
    counts = count_values(found)
    total = sum(counts.values())
    values = sorted(counts.keys() | shares.keys())
    return Comparison(
        counts={value: counts.get(value, 0) for value in values},
        expected={value: round(shares.get(value, 0.0) * total, 2) for value in values},
    )


def average(numbers: Mapping[int, float]) -> float:
    """Return the mean of values, each with its frequency."""
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
    per_identity, cameras, positives = (count_values(pa.array(values)) for values in found)
    return IdentityStatistics(
        images=len(training),
        identities=len(images),
        cameras=len(pc.unique(training["camera_id"])),
        images_per_identity=per_identity,
        cameras_per_identity=cameras,
        positives_per_image=positives,
    )
