"""A manifest and the rules of its data set become a ``Benchmark``, checked up front; first step of an evaluation.

A number that is measured on another data set would stand under the benchmark's name, beside published ones: so the
manifest must be the benchmark's data set, in the form that the settings ask for. A query that can match nothing is
found here, with the reason, before a model is loaded.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..datasets.benchmark import REASONS, Benchmark, Choices, Query, SkippedQuery, Source
from ..datasets.matching import Labels, count_copied_queries, label_benchmark
from ..datasets.registry import list_benchmarks
from ..errors import ConfigError, DataError
from ..records import ImageRecord
from ..shards import read_manifest, read_manifest_provenance
from .settings import DataSettings


logger = logging.getLogger(__name__)

Item = TypeVar("Item")

EXAMPLES_SHOWN = 10
COPIES_IGNORED = "the query's own file ignored"
# The parser of a user's own folders says nothing of the data set, so that the name that the user gave it counts.
OWN_FOLDERS = "pattern"


def load_benchmark(data: DataSettings, *, opens_images: bool = True) -> Benchmark:
    """Read the manifest and return its benchmark, with the queries that can match something.

    ``max_queries`` takes an evenly spaced subset; ``average_precision`` is as the settings say. Without
    ``opens_images``, as scores or features come from a file, missing image files are a warning.

    Raises:
        ConfigError: ``camera_rule: false`` with a published benchmark.
        DataError: no queries, no gallery, image files missing, or no query with a match.
    """
    if data.benchmark != "folder" and not data.camera_rule:
        raise ConfigError(
            f"data.camera_rule: false is not the rule of {data.benchmark}, and its numbers could not be compared "
            "with others. Use data.benchmark: folder to evaluate without the camera rule."
        )
    source = read_source(data)
    benchmark = apply_rules(data, source)
    if data.ignore_copies:
        benchmark = replace(benchmark, ignore_copies=True, variant=f"{benchmark.variant}, {COPIES_IGNORED}")
    benchmark = _leave_out_unranked(_skip_unmatched(benchmark, data))
    unlike = compare_size(benchmark, data, source.variant)
    queries = take_evenly(benchmark.queries, data.max_queries)
    pictures = [query.image for query in queries if query.image is not None]
    check_images([*pictures, *benchmark.gallery], benchmark.image_root, required=opens_images)
    limits = f"Only {len(queries):,} of {len(benchmark.queries):,} queries ask (max_queries)."
    cautions = [limits] if len(queries) < len(benchmark.queries) else []
    if unlike:
        cautions.append(f"Not the published test set: queries x gallery images are {unlike}.")
    changes = {"queries": queries, "unlike_published": unlike, "average_precision": data.average_precision}
    return _note_copies(replace(benchmark, **changes, cautions=tuple(cautions)))


def apply_rules(data: DataSettings, source: Source, **changes: Any) -> Benchmark:
    """Return the benchmark that the data set's rules make of a manifest's records.

    Args:
        data: the evaluation's section.
        source: the records.
        changes: choices other than the settings'.

    Raises:
        ConfigError: choices that do not go together.
        DataError: the manifest lacks what the rules need.
    """
    rules = list_benchmarks()[data.benchmark]
    choices = Choices(
        setting=data.choose("setting") or "",
        shots=data.choose("shots") or "",
        restrict=data.restrict,
        attributes=data.attributes,
        trials=data.trials,
        trials_from=data.trials_from,
        camera_rule=data.camera_rule,
        seed=data.seed,
    )
    return rules.load(source, replace(choices, **changes))


def read_source(data: DataSettings) -> Source:
    """Read the manifest of an evaluation.

    Raises:
        DataError: it is missing or damaged, is of another data set, or has no gallery, or no
            queries where they are images of their own.
    """
    queries_needed = list_benchmarks()[data.benchmark].queries_apart
    records, manifest_root = read_manifest(data.manifest)
    provenance = read_manifest_provenance(data.manifest)
    check_dataset(data, provenance, records)
    queries = [record for record in records if record.split == "query"]
    gallery = [record for record in records if record.split == "gallery"]
    notes = provenance.get("protocol") or {}
    if queries_needed and notes.get("query_is_gallery"):
        raise DataError(f"{data.manifest} is of CUHK03's classic protocol: use data.benchmark: cuhk03_classic.")
    if not gallery or (queries_needed and not queries):
        raise DataError(
            f"{data.manifest} has {len(queries)} queries and {len(gallery)} gallery images; an evaluation needs "
            "both. Choose a manifest whose parser makes the splits query and gallery."
        )
    root = (data.image_root or manifest_root).resolve()
    return Source(data.benchmark, data.manifest, queries, gallery, root, get_variant(provenance), notes)


def name_dataset(provenance: Mapping[str, Any], records: Sequence[ImageRecord]) -> tuple[str, bool]:
    """Return which data set a manifest holds, and whether a parser vouches for it.

    What no parser of a known data set has read (a manifest of one's own making) goes by the name in its records.
    """
    source = provenance.get("source") or {}
    parser = source.get("parser") or source.get("name")
    if parser and parser != OWN_FOLDERS:
        return str(parser), True
    return str(source.get("name") or (records[0].dataset if records else "")), parser == OWN_FOLDERS


def check_dataset(data: DataSettings, provenance: Mapping[str, Any], records: Sequence[ImageRecord]) -> None:
    """Refuse the manifest of another data set, or of another form of it than ``variant`` of the data.

    A manifest without a parser is refused if its name is that of another benchmark.

    Raises:
        DataError: names the data set, and the benchmark that fits it.
    """
    rules = list_benchmarks()
    wanted = rules[data.benchmark].dataset
    dataset, parsed = name_dataset(provenance, records)
    fitting = [name for name, other in rules.items() if dataset and other.dataset == dataset]
    if wanted and dataset != wanted and (parsed or fitting):
        advice = f"set data.benchmark: {' or '.join(fitting)}" if fitting else "no benchmark fits it"
        raise DataError(
            f"{data.manifest} holds the data set {dataset}, but data.benchmark: {data.benchmark} measures {wanted}. "
            f"Choose another manifest, or {advice}; benchmark: folder measures any data with queries and a gallery."
        )
    variant = get_variant(provenance) or data.choices.get("variant", ("",))[0]
    if data.variant is not None and variant.partition("_")[0] != data.variant:
        raise DataError(
            f"{data.manifest} holds {dataset} in the form {variant or '(none named)'}, but the settings say "
            f"data.variant: {data.variant}. Choose the manifest of that form, or the file of eval/ for this one."
        )


def check_split(manifest: Path, split: int) -> None:
    """Refuse a manifest of another split than the one it is named for: the mean would count one split several times.

    What is missing, damaged, or was made by no parser is left to whoever reads it.

    Raises:
        DataError: names both splits.
    """
    try:
        found = (read_manifest_provenance(manifest).get("protocol") or {}).get("trial")
    except DataError:
        return
    if found not in (None, split):
        raise DataError(
            f"{manifest} stands for split {split}, but was parsed as split {found}. Parse it again with "
            f"`trial: {split}` in its source."
        )


def get_variant(provenance: Mapping[str, Any]) -> str:
    """Return the form of the data set that the manifest's source names, e.g. ``v2``; empty if it names none."""
    return str((provenance.get("source") or {}).get("variant") or "")


def compare_size(benchmark: Benchmark, data: DataSettings, variant: str) -> str:
    """Say how the queries and the gallery differ in number from the published test set; nothing if they do not.

    A run on other counts must not stand unmarked beside published figures. Counts are those of eval/README.md.

    Args:
        benchmark: with all of its queries.
        data: the evaluation's section.
        variant: the form of the data set that the manifest has, e.g. ``labeled``.
    """
    sizes = list_benchmarks()[data.benchmark].sizes
    setting, boxes = data.choose("setting"), variant.partition("_")[0] or data.choices.get("variant", ("",))[0]
    forms = ((), (boxes,), (setting,), (setting, data.choose("shots")))
    size = next((sizes[form] for form in forms if form in sizes), None)
    if size is None or data.restrict:
        return ""
    queries, gallery = size
    found = len(benchmark.queries) + len(benchmark.skipped), len(benchmark.trial_galleries[0])
    if found[0] == queries and gallery in (None, found[1]):
        return ""
    wanted = f"{queries:,}" if gallery is None else f"{queries:,} x {gallery:,}"
    return (f"{found[0]:,}" if gallery is None else f"{found[0]:,} x {found[1]:,}") + f" instead of {wanted}"


def _note_copies(benchmark: Benchmark) -> Benchmark:
    """Count the queries whose own file no rule ignores, and warn where it is ranked."""
    copied = count_copied_queries(benchmark)
    if not copied or benchmark.ignore_copies:
        return replace(benchmark, copied_queries=copied)
    caution = (
        f"{copied:,} of {len(benchmark.queries):,} queries have their own file in the gallery, byte for byte, and no "
        "rule ignores it: any model finds it first. Set data.ignore_copies: true, or take such images out of the "
        "gallery."
    )
    logger.warning("%s", caution)
    return replace(benchmark, copied_queries=copied, cautions=(*benchmark.cautions, caution))


def _skip_unmatched(benchmark: Benchmark, data: DataSettings) -> Benchmark:
    """Leave out, with a reason, the queries that match nothing in some trial."""
    if not benchmark.queries:
        name = f"{benchmark.name} ({benchmark.variant})"
        raise DataError(f"{data.manifest}: no query is left by benchmark {name}. Check its labels.")
    labels = label_benchmark(benchmark)
    inside = np.zeros((len(benchmark.trial_galleries), len(benchmark.gallery)), dtype=np.bool_)
    for trial, places in enumerate(benchmark.trial_galleries):
        inside[trial, places] = True
    kept: list[Query] = []
    skipped = list(benchmark.skipped)
    for place, query in enumerate(benchmark.queries):
        matched = inside[:, labels.list_positives(place)].any(axis=1)
        if matched.all():
            kept.append(query)
        else:
            skipped.append(SkippedQuery(query.query_id, _explain(benchmark, labels, place, int((~matched).sum()))))
    _report_skipped(skipped, len(kept), benchmark, data.manifest)
    return replace(benchmark, queries=kept, skipped=tuple(skipped))


def _leave_out_unranked(benchmark: Benchmark) -> Benchmark:
    """Leave out of the gallery what is in no trial, so that nothing is encoded, asked for or counted in vain."""
    if not benchmark.trials:
        return benchmark
    ranked = np.unique(np.concatenate(benchmark.trials))
    trials = tuple(np.searchsorted(ranked, places) for places in benchmark.trials)
    return replace(benchmark, gallery=[benchmark.gallery[place] for place in ranked.tolist()], trials=trials)


def _explain(benchmark: Benchmark, labels: Labels, place: int, unmatched_trials: int) -> str:
    query = benchmark.queries[place]
    if not (labels.gallery_person == labels.query_person[place]).any():
        return f"identity {query.person_id} is absent from the gallery"
    if len(labels.list_positives(place)):
        trials = len(benchmark.trial_galleries)
        return f"identity {query.person_id} has no match in the gallery of {unmatched_trials} of {trials} trials"
    if place in labels.copies:
        return f"identity {query.person_id} has no other match than the query's own file"
    return f"identity {query.person_id} {REASONS[benchmark.rule].format(camera=query.camera_id)}"


def _report_skipped(skipped: list[SkippedQuery], kept: int, benchmark: Benchmark, manifest: Path) -> None:
    """Warn of queries without a match; refuse if none is left."""
    if not skipped:
        return
    lines = [f"  {item.query_id}: {item.reason}" for item in skipped[:EXAMPLES_SHOWN]]
    if len(skipped) > EXAMPLES_SHOWN:
        lines.append(f"  ... and {len(skipped) - EXAMPLES_SHOWN} more")
    total = len(skipped) + kept
    text = f"{len(skipped)} of {total} queries in {manifest} have no match in the gallery:\n" + "\n".join(lines)
    if kept:
        logger.warning("%s\nThey are skipped and are in no average.", text)
        return
    advice = "Check that query and gallery share identities"
    if benchmark.rule == "same_camera":
        advice += "; if the cameras are unknown or all the same, set data.benchmark=folder data.camera_rule=false"
    raise DataError(f"{text}\nNo query is left to evaluate. {advice}.")


def take_evenly(items: Sequence[Item], limit: int | None) -> list[Item]:
    """Return at most ``limit`` items, evenly spaced and in order; always the same ones."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[place * len(items) // limit] for place in range(limit)]


def check_images(records: Iterable[ImageRecord], image_root: Path, *, required: bool = True) -> None:
    """Refuse to begin while image files are missing; where they are not required, warn.

    Raises:
        DataError: names the first missing ones.
    """
    missing = sorted({record.path for record in records if not (image_root / record.path).is_file()})
    if missing:
        shown = "".join(f"\n  {path}" for path in missing[:EXAMPLES_SHOWN])
        text = (
            f"{len(missing)} image file(s) of the manifest are not under {image_root}:{shown}\n"
            "Set image_root to the folder that the paths are relative to."
        )
        if required:
            raise DataError(text)
        logger.warning("%s\nNo image is looked at: only the pictures of the report will be missing.", text)
