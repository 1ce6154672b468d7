"""What an audit finds: each leaking training image with the tested image that shows it, as text, JSON or a table."""

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ...errors import ConfigError, DataError
from ...shards import open_atomically


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
