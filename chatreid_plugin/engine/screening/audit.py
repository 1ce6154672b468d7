"""Looks for test images and test identities among the training images, within and across data sets.

Benchmarks share images: ICFG-PEDES and RSTPReid are new labels for MSMT17's images, test images among them, and
CUHK-PEDES holds images of Market-1501, CUHK01 and CUHK03 (shared notes on protocols, section 2, "Leakage").
"""

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from ...config import BuildSettings
from ...errors import ConfigError, DataError
from ...printing import say
from ...records import ImageRecord
from ...shards import keep_records, list_records, open_atomically, pc, read_manifest
from .hashing import find_close_pairs, find_first_equal, select_hashed


Kind = Literal["identity", "path", "content", "perceptual", "linked"]

# In the order of an audit.
KINDS: dict[Kind, str] = {
    "identity": "shows a tested identity",
    "path": "is a tested image, by its path or published file name",
    "content": "is a tested image, by the bytes of its file",
    "perceptual": "is a tested image, by its perceptual hash",
    "linked": "shows an identity of which another image is a tested one",
}
_NAMED = 20
TABLE_SUFFIXES = (".csv", ".jsonl")


@dataclass(frozen=True, slots=True)
class Leak:
    """One training image that must not be trained on.

    Attributes:
        kind: how it was found.
        training_image: its image_id.
        training_person: its identity.
        training_dataset: its data set.
        tested_image: image_id of the query or gallery image that shows it: the same image, one of the same identity
            (``identity``), or the one that links the identities (``linked``).
        tested_person: identity of that image.
        tested_dataset: data set of that image.
        distance: bits in which the hashes differ, for ``perceptual``.
    """

    kind: Kind
    training_image: str
    training_person: str
    training_dataset: str
    tested_image: str
    tested_person: str
    tested_dataset: str
    distance: int | None = None


@dataclass(frozen=True, slots=True)
class AuditReport:
    """The result of an audit.

    Attributes:
        training: number of training images looked at.
        tested: number of query and gallery images looked at.
        leaks: ordered by kind, then by training image as given.
    """

    training: int
    tested: int
    leaks: list[Leak] = field(default_factory=list[Leak])

    @property
    def exit_code(self) -> int:
        """0 if nothing leaks, else that of a DataError."""
        return DataError.exit_code if self.leaks else 0

    def list_images(self) -> list[str]:
        """Return the image_ids of the training images to leave out, each once."""
        return list(dict.fromkeys(leak.training_image for leak in self.leaks))

    def _group_leaks(self) -> dict[Kind, list[Leak]]:
        groups: dict[Kind, list[Leak]] = {kind: [] for kind in KINDS}
        for leak in self.leaks:
            groups[leak.kind].append(leak)
        return {kind: leaks for kind, leaks in groups.items() if leaks}

    def count_kinds(self) -> dict[str, dict[str, int]]:
        """Return kind -> number of training images and of their identities, for each kind that was found."""
        return {
            kind: {
                "images": len({leak.training_image for leak in leaks}),
                "identities": len({leak.training_person for leak in leaks}),
            }
            for kind, leaks in self._group_leaks().items()
        }

    def count_pairs(self) -> list[dict[str, str | int]]:
        """Return the number of leaks for each training set, tested set and kind."""
        pairs = Counter((leak.training_dataset, leak.tested_dataset, leak.kind) for leak in self.leaks)
        return [
            {"training": training, "tested": tested, "kind": kind, "leaks": count}
            for (training, tested, kind), count in pairs.items()
        ]

    def render(self) -> str:
        """Return the report as text; of each kind the first 20 are named."""
        looked_at = f"{self.training:,} training images against {self.tested:,} query and gallery images"
        if not self.tested:
            return f"{looked_at}: nothing is tested. Name manifests in audit_against, or a source with a test set."
        if not self.leaks:
            return f"{looked_at}: nothing leaks."
        lines = [f"{looked_at}: {len(self.list_images()):,} training images leak."]
        for pair in self.count_pairs():
            lines.append(f"  {pair['training']} -> {pair['tested']}: {pair['leaks']:,} ({pair['kind']})")
        counts = self.count_kinds()
        for kind, leaks in self._group_leaks().items():
            images, people = counts[kind]["images"], counts[kind]["identities"]
            lines.append(f"{kind}: {images:,} images of {people:,} identities; each {KINDS[kind]}")
            lines += [f"  {describe_leak(leak)}" for leak in leaks[:_NAMED]]
            if len(leaks) > _NAMED:
                lines.append(f"  ... and {len(leaks) - _NAMED:,} more (--write FILE lists all)")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Return the report as JSON: counts, the first 20 of each kind, and the training images to leave out."""
        values: dict[str, Any] = {
            "training": self.training,
            "tested": self.tested,
            "kinds": self.count_kinds(),
            "pairs": self.count_pairs(),
            "first": [asdict(leak) for leaks in self._group_leaks().values() for leak in leaks[:_NAMED]],
            "drop": self.list_images(),
        }
        return json.dumps(values, indent=2, ensure_ascii=False)


def describe_leak(leak: Leak) -> str:
    """Return a leak in a line."""
    if leak.kind == "identity":
        return f"{leak.training_image} shows {leak.tested_person}, as does {leak.tested_image}"
    if leak.kind == "linked":
        return f"{leak.training_image}: {leak.training_person} is {leak.tested_person} of {leak.tested_image}"
    differing = "" if leak.distance is None else f" ({leak.distance} bits differ)"
    return f"{leak.training_image} = {leak.tested_image}{differing}"


def check_table_name(path: Path) -> None:
    """Raise ConfigError unless the name ends in a format that ``write_leaks`` knows."""
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise ConfigError(f"{path}: the name must end in {' or '.join(TABLE_SUFFIXES)}.")


def write_leaks(path: Path, leaks: Sequence[Leak]) -> None:
    """Write all leaks, as CSV or JSON Lines by the name's ending, atomically.

    Raises:
        ConfigError: the name has another ending.
    """
    check_table_name(path)
    rows = [asdict(leak) for leak in leaks]
    with open_atomically(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        if path.suffix.lower() == ".csv":
            writer = csv.DictWriter(file, [column.name for column in fields(Leak)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


TESTED_SPLITS = ("query", "gallery")
# Measured on 768 real and 3,360 synthetic crops: an image saved again as JPEG (quality 50 to 90) or scaled smoothly
# (0.5 to 2 times) differs in at most 12 of 256 bits, halved and saved at quality 50 in at most 14 for 93 of 100 (26 at
# most); two images of one person in one camera differ in at least 36, of two people in at least 52. Distances are
# even, as all these hashes have 128 bits set.
PERCEPTUAL_BITS = 14
# An image cut by 2 % on each side differs in up to 64 bits; of 1,000 pairs of two people 999 differ in 88 or more.
_OTHER_IMAGE_BITS = 80
# A name such as 0000_000_01_0303morning_0008_0.jpg or 0002_c1s1_000451_03.jpg is found once in the world; 0001.jpg in
# every folder.
_DISTINCTIVE_LENGTH, _DISTINCTIVE_DIGITS = 12, 8
_NAMED_IN_ERROR = 5

# Row of a training image, row of a tested image, bits in which the hashes differ if that was the criterion.
Match = tuple[int, int, int | None]


def select_tested(records: Sequence[ImageRecord]) -> list[ImageRecord]:
    """Return the query and gallery images."""
    return [record for record in records if record.split in TESTED_SPLITS]


def read_tested_manifests(paths: Sequence[Path]) -> list[ImageRecord]:
    """Return the query and gallery images of manifests (``audit_against``).

    Raises:
        DataError: a manifest is missing, unreadable, or has no such images.
    """
    tested: list[ImageRecord] = []
    for path in paths:
        found = select_tested(read_manifest(path)[0])
        if not found:
            raise DataError(f"{path} of audit_against holds no query or gallery images. Leave it out.")
        tested += found
    return tested


def audit_records(
    training: Sequence[ImageRecord], tested: Sequence[ImageRecord], bits: int = PERCEPTUAL_BITS
) -> AuditReport:
    """Find the training images that must not be trained on.

    - ``identity``: its person_id is tested.
    - ``path``: its image_id is tested, or a tested image of another data set has its published file name. Such a name
      has 12 characters and 8 digits at least (without its ending) and occurs once among the training images of the
      one and the tested images of the other; it does not count if the hashes of the two differ in more than 80 bits.
    - ``content``: a tested file has the same bytes.
    - ``perceptual``: a tested image's hash differs in at most ``bits`` bits. Flat pictures do not count
      (``hashing.select_hashed``).
    - ``linked``: another image of its identity is one of a tested identity by one of the three criteria above, so
      that it shows a tested person, too. Flat pictures link nobody.

    A training image is reported once for each data set in which it is tested, by the first of path, content and
    perceptual that applies, with the first tested image that shows it. Records without a hash are compared by the
    other criteria.

    Args:
        training: images to train on.
        tested: query and gallery images.
        bits: 0 to 15.
    """
    leaks = _find_identities(training, tested)
    shared = list(_find_shared(training, tested, bits))
    textured = set(select_hashed([training[i] for _, (i, _, _) in shared])[0].tolist())
    links: dict[str, int] = {}
    for number, (kind, (i, j, distance)) in enumerate(shared):
        leaks.append(_make_leak(kind, training[i], tested[j], distance))
        if number in textured or not training[i].perceptual_hash:
            links.setdefault(training[i].person_id, j)
    found = {leak.training_image for leak in leaks}
    leaks += [
        _make_leak("linked", record, tested[links[record.person_id]])
        for record in training
        if record.person_id in links and record.image_id not in found
    ]
    return AuditReport(len(training), len(tested), leaks)


def _make_leak(kind: Kind, training: ImageRecord, tested: ImageRecord, distance: int | None = None) -> Leak:
    return Leak(
        kind=kind,
        training_image=training.image_id,
        training_person=training.person_id,
        training_dataset=training.dataset,
        tested_image=tested.image_id,
        tested_person=tested.person_id,
        tested_dataset=tested.dataset,
        distance=distance,
    )


def _find_identities(training: Sequence[ImageRecord], tested: Sequence[ImageRecord]) -> list[Leak]:
    people: dict[str, ImageRecord] = {}
    for record in tested:
        people.setdefault(record.person_id, record)
    return [
        _make_leak("identity", record, people[record.person_id]) for record in training if record.person_id in people
    ]


def _find_shared(
    training: Sequence[ImageRecord], tested: Sequence[ImageRecord], bits: int
) -> Iterator[tuple[Kind, Match]]:
    """Yield each training image that is tested, once for each tested data set, by the first criterion."""
    criteria: tuple[tuple[Kind, Iterable[Match]], ...] = (
        ("path", sorted([*_match_ids(training, tested), *_match_names(training, tested)], key=_get_rows)),
        ("content", _match_content(training, tested)),
        ("perceptual", _match_looks(training, tested, bits)),
    )
    seen: set[tuple[int, str]] = set()
    for kind, matches in criteria:
        for i, j, distance in matches:
            if (i, tested[j].dataset) not in seen:
                seen.add((i, tested[j].dataset))
                yield kind, (i, j, distance)


def _get_rows(match: Match) -> tuple[int, int]:
    return match[0], match[1]


def _match_ids(training: Sequence[ImageRecord], tested: Sequence[ImageRecord]) -> Iterator[Match]:
    rows = {record.image_id: j for j, record in enumerate(tested)}
    for i, record in enumerate(training):
        if record.image_id in rows:
            yield i, rows[record.image_id], None


def _get_name(record: ImageRecord) -> str:
    """Return the file's name without its ending, which changes when a file is saved again."""
    name = record.path.rpartition("/")[2]
    return (name.rpartition(".")[0] or name).lower()


def _is_distinctive(name: str) -> bool:
    return len(name) >= _DISTINCTIVE_LENGTH and sum(map(str.isdigit, name)) >= _DISTINCTIVE_DIGITS


def _match_names(training: Sequence[ImageRecord], tested: Sequence[ImageRecord]) -> Iterator[Match]:
    """Yield images of two data sets that share a published file name."""
    # A test set may be listed twice, as a source and in audit_against: images are counted, not records.
    rows: dict[str, dict[str, dict[str, int]]] = {}
    for j, record in enumerate(tested):
        name = _get_name(record)
        if _is_distinctive(name):
            rows.setdefault(name, {}).setdefault(record.dataset, {}).setdefault(record.image_id, j)
    names = [_get_name(record) for record in training]
    counts = Counter((record.dataset, name) for record, name in zip(training, names, strict=True) if name in rows)
    for i, (record, name) in enumerate(zip(training, names, strict=True)):
        if counts[record.dataset, name] != 1:
            continue
        for dataset, images in rows[name].items():
            j = next(iter(images.values()))
            if dataset != record.dataset and len(images) == 1 and not _differ(record, tested[j]):
                yield i, j, None


def _differ(first: ImageRecord, second: ImageRecord) -> bool:
    """Return whether the hashes, where both are known, say that these are different images."""
    if not first.perceptual_hash or not second.perceptual_hash:
        return False
    return (int(first.perceptual_hash, 16) ^ int(second.perceptual_hash, 16)).bit_count() > _OTHER_IMAGE_BITS


def _match_content(training: Sequence[ImageRecord], tested: Sequence[ImageRecord]) -> Iterator[Match]:
    rows: dict[str, dict[str, int]] = {}
    for j, record in enumerate(tested):
        if record.content_hash:
            rows.setdefault(record.content_hash, {}).setdefault(record.dataset, j)
    for i, record in enumerate(training):
        for j in rows.get(record.content_hash, {}).values():
            yield i, j, None


def _match_looks(training: Sequence[ImageRecord], tested: Sequence[ImageRecord], bits: int) -> Iterator[Match]:
    """Yield images whose hashes are close, the closest tested one first."""
    training_rows, training_words = select_hashed(training)
    tested_rows, tested_words = select_hashed(tested)
    # The search takes the first of equal hashes for all of them.
    rows: dict[int, dict[str, int]] = {}
    for first, j in zip(find_first_equal(tested_words).tolist(), tested_rows.tolist(), strict=True):
        rows.setdefault(first, {}).setdefault(tested[j].dataset, j)
    pairs = find_close_pairs(training_words, tested_words, bits)
    near: dict[int, list[tuple[int, int]]] = {}
    for left, right, distance in zip(pairs.left.tolist(), pairs.right.tolist(), pairs.distances.tolist(), strict=True):
        near.setdefault(left, []).append((right, distance))
    first_rows = find_first_equal(training_words)
    for index in np.flatnonzero(np.isin(first_rows, pairs.left)).tolist():
        for right, distance in near[int(first_rows[index])]:
            for j in rows[right].values():
                yield int(training_rows[index]), j, distance


def apply_leak_rule(
    training_by_source: Sequence[Sequence[ImageRecord]], tested: Sequence[ImageRecord], settings: BuildSettings
) -> list[list[ImageRecord]]:
    """Return the training images of each source after ``leaks``: all of them, or those that do not leak.

    Args:
        training_by_source: the training images of each source.
        tested: query and gallery images of all sources and of ``audit_against``.
        settings: ``leaks`` says what to do: ``refuse``, ``drop`` or ``allow`` (a warning on stderr).

    Raises:
        DataError: something leaks and ``leaks`` is ``refuse``; or it is ``drop`` and a source has nothing left.
    """
    sources = [list(records) for records in training_by_source]
    report = audit_records([record for records in sources for record in records], tested, settings.audit_bits)
    if not report.leaks:
        return sources
    leaking = set(report.list_images())
    if settings.leaks == "refuse":
        first = "; ".join(describe_leak(leak) for leak in report.leaks[:_NAMED_IN_ERROR])
        raise DataError(
            f"{len(leaking)} training images are test images or show tested people: {first}; ... "
            "`chatreid audit CONFIG` names them. Set leaks: drop to leave them out, or leaks: allow to train on them."
        )
    if settings.leaks == "allow":
        say(f"warning: {len(leaking)} training images leak into the test (leaks: allow)", aside=True)
        return sources
    kept = [[record for record in records if record.image_id not in leaking] for records in sources]
    for before, after in zip(sources, kept, strict=True):
        if before and not after:
            raise DataError(
                f"All {len(before)} training images of {before[0].dataset} leak into the test, so leaks: drop leaves "
                "nothing of it. Take it out of training (stages: [])."
            )
    say(f"leaks: drop left out {len(leaking)} training images that leak into the test", aside=True)
    return kept


def drop_leaks(training: Sequence[pa.Table], tables: Sequence[pa.Table], settings: BuildSettings) -> list[pa.Table]:
    """Return the training images without those that leak from a test set.

    Args:
        training: training images of the sources that train a stage, tables of ``IMAGE_RECORD_SCHEMA``.
        tables: all images of all sources, for the tested ones among them.
        settings: the recipe.

    Raises:
        DataError: images leak and ``leaks`` is ``refuse``.
    """
    tested = [record for table in tables for record in _list_tested(table)]
    tested += read_tested_manifests(settings.audit_against)
    if not tested:
        return list(training)
    kept = apply_leak_rule([list_records(table) for table in training], tested, settings)
    return [keep_records(table, records) for table, records in zip(training, kept, strict=True)]


def _list_tested(table: pa.Table) -> list[ImageRecord]:
    chosen = pc.is_in(table["split"], pa.array(TESTED_SPLITS))
    # Filtering looks at every row of the nested columns, even to find nothing.
    return list_records(table.filter(chosen)) if pc.any(chosen).as_py() else []
