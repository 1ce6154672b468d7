"""Looks for test images and test identities among the training images, within and across data sets.

Benchmarks share images: ICFG-PEDES and RSTPReid are new labels for MSMT17's images, test images among them, and
CUHK-PEDES holds images of Market-1501, CUHK01 and CUHK03 (shared notes on protocols, section 2, "Leakage").
"""

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa

from ...config import BuildSettings
from ...errors import ConfigError, DataError
from ...printing import say
from ...shards import keep_rows, open_atomically, pc
from .hashing import find_close_pairs, find_first_equal, select_hashed


# A pandas DataFrame, which has no types.
Frame = Any
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
_COLUMNS = ["image_id", "person_id", "dataset", "path", "content_hash", "perceptual_hash"]


def audit_images(training: pa.Table, tested: pa.Table, bits: int = PERCEPTUAL_BITS) -> AuditReport:
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
    perceptual that applies, with the first tested image that shows it. Images without a hash are compared by the
    other criteria.

    Args:
        training: images to train on, a table of ``IMAGE_RECORD_SCHEMA``.
        tested: query and gallery images, likewise.
        bits: 0 to 15.
    """
    # Each image's number; a pair of images is a row of ``training`` and ``tested``.
    ours, theirs = (
        table.select(_COLUMNS).to_pandas().fillna("").rename_axis(name).reset_index()
        for name, table in (("training", training), ("tested", tested))
    )
    people = _join(ours, theirs, "person_id")
    paths = pd.concat([_join(ours, theirs, "image_id"), _match_names(ours, theirs)])
    pairs = {
        "path": paths.sort_values(["training", "tested"]),
        "content": _join(ours[ours["content_hash"] != ""], theirs, "content_hash", "dataset"),
        "perceptual": _match_looks(training, tested, theirs, bits),
    }
    shared = pd.concat([found.assign(kind=kind) for kind, found in pairs.items()], ignore_index=True)
    shared["dataset"] = theirs["dataset"].to_numpy()[shared["tested"]]
    shared = shared.drop_duplicates(["training", "dataset"])
    images = ours.loc[shared["training"]]
    sound = images["training"].isin(select_hashed(training)[0]) | (images["perceptual_hash"] == "")
    links = shared.assign(person_id=images["person_id"].to_numpy())[sound.to_numpy()]
    unseen = ours[~ours["training"].isin([*people["training"], *shared["training"]])]
    linked = _join(unseen, links, "person_id")
    leaks = pd.concat([people.assign(kind="identity"), shared, linked.assign(kind="linked")])
    return AuditReport(training.num_rows, tested.num_rows, _list_leaks(leaks, ours, theirs))


def _list_leaks(pairs: Frame, ours: Frame, theirs: Frame) -> list[Leak]:
    columns: list[Any] = [pairs["kind"]]
    for name, side in (("training", ours), ("tested", theirs)):
        columns += [side[column].loc[pairs[name]] for column in ("image_id", "person_id", "dataset")]
    columns.append([None if pd.isna(bits) else int(bits) for bits in pairs["distance"]])
    return [Leak(*row) for row in zip(*columns, strict=True)]


def _join(ours: Frame, theirs: Frame, key: str, *each: str) -> Frame:
    """Return pairs of equal ``key``, in the order of our images; of theirs the first, or that of each data set."""
    firsts = theirs.drop_duplicates([key, *each])
    pairs = ours[["training", key]].merge(firsts[["tested", key]], on=key)
    # Merging keeps no order where several of both sides are equal.
    return pairs[["training", "tested"]].sort_values(["training", "tested"])


def _get_name(path: str) -> str:
    """Return the file's name without its ending, which changes when a file is saved again."""
    name = path.rpartition("/")[2]
    return (name.rpartition(".")[0] or name).lower()


def _is_distinctive(name: str) -> bool:
    return len(name) >= _DISTINCTIVE_LENGTH and sum(map(str.isdigit, name)) >= _DISTINCTIVE_DIGITS


def _match_names(ours: Frame, theirs: Frame) -> Frame:
    """Return images of two data sets that share a published file name."""
    sides: list[Frame] = []
    # A test set may be listed twice, as a source and in audit_against: images are counted, not records.
    for images in (ours, theirs.drop_duplicates("image_id")):
        named = images.assign(name=images["path"].map(_get_name))
        named = named[named["name"].map(_is_distinctive).astype(bool)]
        sides.append(named[~named.duplicated(["dataset", "name"], keep=False)])
    pairs = sides[0].merge(sides[1], on="name", suffixes=("", "_tested"))
    hashes = zip(pairs["perceptual_hash"], pairs["perceptual_hash_tested"], strict=True)
    alike = np.array([not _differ(*pair) for pair in hashes], dtype=bool)
    return pairs[alike & (pairs["dataset"] != pairs["dataset_tested"])][["training", "tested"]]


def _differ(first: str, second: str) -> bool:
    """Return whether the hashes, where both are known, say that these are different images."""
    return bool(first and second) and (int(first, 16) ^ int(second, 16)).bit_count() > _OTHER_IMAGE_BITS


def _match_looks(training: pa.Table, tested: pa.Table, theirs: Frame, bits: int) -> Frame:
    """Return images whose hashes are close, the closest tested one first."""
    rows, words = select_hashed(training)
    tested_rows, tested_words = select_hashed(tested)
    pairs = find_close_pairs(words, tested_words, bits)
    # The search takes the first of equal hashes for all of them.
    ours = pd.DataFrame({"training": rows, "left": find_first_equal(words)})
    shown = pd.DataFrame({"tested": tested_rows, "right": find_first_equal(tested_words)})
    shown["dataset"] = theirs["dataset"].to_numpy()[tested_rows]
    close = pd.DataFrame({"left": pairs.left, "right": pairs.right, "distance": pairs.distances})
    found = ours.merge(close, on="left").merge(shown.drop_duplicates(["right", "dataset"]), on="right")
    return found.sort_values(["training", "distance", "right", "tested"])[["training", "tested", "distance"]]


def apply_leak_rule(
    training_by_source: Sequence[pa.Table], tested: pa.Table, settings: BuildSettings
) -> list[pa.Table]:
    """Return the training images of each source after ``leaks``: all of them, or those that do not leak.

    Args:
        training_by_source: the training images of each source, tables of ``IMAGE_RECORD_SCHEMA``.
        tested: query and gallery images of all sources and of ``audit_against``, likewise.
        settings: ``leaks`` says what to do: ``refuse``, ``drop`` or ``allow`` (a warning on stderr).

    Raises:
        DataError: something leaks and ``leaks`` is ``refuse``; or it is ``drop`` and a source has nothing left.
    """
    sources = list(training_by_source)
    report = audit_images(pa.concat_tables(sources), tested, settings.audit_bits)
    if not report.leaks:
        return sources
    leaking = report.list_images()
    if settings.leaks == "refuse":
        first = "; ".join(describe_leak(leak) for leak in report.leaks[:_NAMED_IN_ERROR])
        raise DataError(
            f"{len(leaking)} training images are test images or show tested people: {first}; ... "
            "`chatreid audit CONFIG` names them. Set leaks: drop to leave them out, or leaks: allow to train on them."
        )
    if settings.leaks == "allow":
        say(f"warning: {len(leaking)} training images leak into the test (leaks: allow)", aside=True)
        return sources
    kept: list[pa.Table] = []
    for before in sources:
        after = keep_rows(before, pc.invert(pc.is_in(before["image_id"], pa.array(leaking))))
        if before.num_rows and not after.num_rows:
            raise DataError(
                f"All {before.num_rows} training images of {before['dataset'][0]} leak into the test, so leaks: drop "
                "leaves nothing of it. Take it out of training (stages: [])."
            )
        kept.append(after)
    say(f"leaks: drop left out {len(leaking)} training images that leak into the test", aside=True)
    return kept
