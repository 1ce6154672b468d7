"""The nouns of a benchmark: who asks, what is ranked, what is ignored, and how a data set's file says so.

A data set's file has a table ``BENCHMARKS`` of ``BenchmarkRules``; ``eval/loader.py`` reads a manifest into a
``Source`` and lets the rules make a ``Benchmark`` of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np

from ..archives import IntArray
from ..errors import DataError
from ..records import Attribute, ImageRecord, Modality
from ..tasks import ASKED, format_attributes


Cmc = Literal["standard", "unique_identity", "single_gallery_shot"]
Ties = Literal["expected", "index", "optimistic", "pessimistic"]
AveragePrecision = Literal["mean", "trapezoid", "top500"]

# What is removed from a query's ranking before it is measured, always of the query's own identity but for same_room:
# same_camera (Zheng et al., Market-1501, 2015); cloth_changing and same_clothes (Simple-CCReID, tools/eval_metrics.py,
# modes CC and SC); same_room (SYSU-MM01: its cameras 2 and 3 stand in one room, so the gallery of camera 2 is removed
# for queries of camera 3, whoever it shows); same_image (attribute sets, where images and not people match).
Rule = Literal["nothing", "same_camera", "cloth_changing", "same_clothes", "same_room", "same_image"]

RULES: Mapping[Rule, str] = {
    "nothing": "nothing ignored",
    "same_camera": "same identity and same camera ignored",
    "cloth_changing": "same identity with same camera or same clothes ignored",
    "same_clothes": "same identity with same camera or other clothes ignored",
    "same_room": "for camera 3 the gallery of camera 2 ignored",
    "same_image": "the query's own image ignored",
}
REASONS: Mapping[Rule, str] = {
    "nothing": "",
    "same_camera": "is only seen by the query's own camera {camera}",
    "cloth_changing": "is only seen by the query's own camera {camera} or in the query's clothes",
    "same_clothes": "is only seen by the query's own camera {camera} or in other clothes",
    "same_room": "is only seen in the query's own room (camera {camera})",
    "same_image": "is only in the query's own image",
}
PARSE_AGAIN = "Parse the data set again, or use data.benchmark: folder."


@dataclass(frozen=True, slots=True)
class Query:
    """One query of an evaluation.

    Attributes:
        query_id: unique in its benchmark: the image's id, or ``<image id>#<caption number>`` and the like.
        person_id: whom it asks for; gallery images of this identity match.
        camera_id: camera of its image; empty for words.
        clothes_id: outfit in its image, where the data set has one.
        image: the picture, or None for words alone.
        text: what is said of the person in words; empty for an image alone.
        attributes: attributes asked for, name to value.
    """

    query_id: str
    person_id: str
    camera_id: str = ""
    clothes_id: str | None = None
    image: ImageRecord | None = None
    text: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def label(self) -> str:
        """What a message or a page calls it: the image's path, or its words."""
        return self.image.path if self.image is not None else f'"{self.text}"' if self.text else self.query_id

    @property
    def words(self) -> str:
        """Its text, or the attributes it asks for (``upper colour: red, hat: none``)."""
        return self.text or format_attributes([Attribute(ASKED, *item) for item in self.attributes.items()])


def make_image_query(record: ImageRecord) -> Query:
    """Return the query that shows this image and says nothing."""
    return Query(record.image_id, record.person_id, record.camera_id, record.clothes_id, record)


@dataclass(frozen=True, slots=True)
class SkippedQuery:
    """A query that no gallery image can match, and why."""

    query_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark, ready to be measured: who asks, what is ranked, and by which rules.

    Attributes:
        name: as in the YAML.
        variant: the rules in words, for the report.
        queries: every query that has a match.
        gallery: everything that is ranked in any trial, in the manifest's order.
        image_root: folder that the records' paths are relative to.
        rule: what is ignored for each query.
        trials: for each trial the gallery indices that take part, ascending; empty: one trial with all of them.
        average_precision: definition, as in ``evaluate_ranking``.
        cmc: definition, as in ``evaluate_ranking``.
        skipped: queries left out because nothing can match them.
        split: what in ``variant`` names the split, where the manifest is one of several.
        ranks_captions: the gallery are captions: records of the images that they describe, each with its one caption
            and ``<image id>#<number>`` for an id.
        ignore_copies: whether a query's own file in the gallery is ignored, whatever the rule says.
        copied_queries: how many queries have their own file in the gallery, where the rule does not ignore it.
        unlike_published: how queries and gallery differ in number from the published ones; empty if they do not.
        cautions: what a reader has to know before figures of it are quoted.
    """

    name: str
    variant: str
    queries: list[Query]
    gallery: list[ImageRecord]
    image_root: Path
    rule: Rule = "same_camera"
    trials: tuple[IntArray, ...] = ()
    average_precision: AveragePrecision = "mean"
    cmc: Cmc = "standard"
    skipped: tuple[SkippedQuery, ...] = ()
    split: str = ""
    ranks_captions: bool = False
    ignore_copies: bool = False
    copied_queries: int = 0
    unlike_published: str = ""
    cautions: tuple[str, ...] = ()

    @property
    def ties(self) -> Ties:
        """How equal scores are measured: ``top500`` cuts the list, and so needs one order of them."""
        return "index" if self.average_precision == "top500" else "expected"

    @property
    def trial_galleries(self) -> tuple[IntArray, ...]:
        """The gallery indices of every trial, of the only one too."""
        return self.trials or (np.arange(len(self.gallery)),)


@dataclass(frozen=True, slots=True)
class Choices:
    """How a benchmark is run, where it can be run in several ways: keys of ``eval/README.md``, none of them null.

    ``setting`` and ``shots`` are one of the rules' ``choices``; ``trials_from`` may be None: what the manifest has.
    """

    setting: str = ""
    shots: str = ""
    restrict: bool = False
    attributes: tuple[str, ...] = ()
    trials: int = 10
    trials_from: str | None = None
    camera_rule: bool = True
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """What a manifest holds for an evaluation.

    Attributes:
        name: the benchmark's, as in the YAML.
        path: the manifest.
        queries: records of split ``query``.
        gallery: records of split ``gallery``.
        image_root: folder that the records' paths are relative to.
        variant: form of the data set, e.g. ``v2``; empty if it has one only.
        notes: what the parser found for the evaluation (published trials, people that change clothes).
    """

    name: str
    path: Path
    queries: list[ImageRecord]
    gallery: list[ImageRecord]
    image_root: Path
    variant: str
    notes: Mapping[str, Any]

    def need(self, key: str, advice: str) -> Any:
        """Return a note of the parser.

        Raises:
            DataError: the manifest has none.
        """
        if key not in self.notes:
            raise DataError(f"{self.path} says nothing of {key}. {advice}")
        return self.notes[key]

    def need_clothes(self) -> None:
        """Refuse a manifest without the clothes that the rules are about.

        Raises:
            DataError: names the side that has no clothes label.
        """
        sides = {"query": self.queries, "gallery": self.gallery}
        bare = [name for name, records in sides.items() if not any(record.clothes_id for record in records)]
        if bare:
            what = "image has a clothes label, and the setting is about clothes"
            raise DataError(f"{self.path}: no {' and no '.join(bare)} {what}. {PARSE_AGAIN}")

    def turn(self, asking: Modality) -> "Source":
        """Return it with images of this modality as queries, and those of the other as gallery.

        Raises:
            DataError: one side is not all visible and the other all infrared.
        """
        found = [{record.modality for record in records} for records in (self.queries, self.gallery)]
        if found not in ([{"infrared"}, {"visible"}], [{"visible"}, {"infrared"}]):
            problem = "no query or gallery image fits: one side must be infrared and the other visible"
            raise DataError(f"{self.path}: {problem}. {PARSE_AGAIN}")
        return self if found[0] == {asking} else replace(self, queries=self.gallery, gallery=self.queries)

    def ask_with_images(
        self, variant: str, rule: Rule = "same_camera", *, asking: Sequence[ImageRecord] | None = None
    ) -> Benchmark:
        """Return the benchmark in which the queries' images (or those that are ``asking``) ask in the gallery.

        Args:
            variant: the rules in words; what is ignored is added.
            rule: what is ignored.
            asking: images that ask, where they are not the split ``query``.
        """
        queries = [make_image_query(record) for record in (self.queries if asking is None else asking)]
        return Benchmark(self.name, f"{variant}, {RULES[rule]}", queries, self.gallery, self.image_root, rule)


@dataclass(frozen=True, slots=True)
class BenchmarkRules:
    """How a data set is measured: an entry of a module's ``BENCHMARKS``, under its name in the YAML.

    Attributes:
        load: makes the benchmark of what a manifest holds; raises DataError where that lacks what the rules need.
        dataset: parser of the data set that the manifest has to hold; empty for any.
        choices: key of the YAML -> the values that it may have here, the first for null; null of ``variant`` and
            ``trials_from`` is what the manifest has. A key that is not named has to stay unset.
        sizes: the published test set's queries (those that match nothing, too) and gallery images of a trial, None
            where nobody says. Its key is ``()``, or the variant, the setting, or setting and shots it depends on.
        queries_apart: whether the queries are a split of their own.
        asks_in_words: whether words alone stand against images.
        choice_task: which choice a model is trained to make on it (paper section 3.3).
        top_k: most candidates that a filter leaves a query where nothing else is said: several times the images that
            show one person.
        training: choices that rank training images all at once, for ``tau: auto``.
    """

    load: Callable[[Source, Choices], Benchmark]
    dataset: str = ""
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict[str, tuple[Any, ...]])
    sizes: Mapping[tuple[str, ...], tuple[int, int | None]] = field(
        default_factory=dict[tuple[str, ...], tuple[int, int | None]]
    )
    queries_apart: bool = True
    asks_in_words: bool = False
    choice_task: str = "standard_reid"
    top_k: int = 100
    training: Mapping[str, Any] = field(default_factory=dict[str, Any])


def draw_by_camera(gallery: Sequence[ImageRecord], cameras: Sequence[str], trial: int) -> IntArray:
    """Return one gallery index for each identity and camera, drawn as AGW does.

    ``random.seed(trial)``, then identities and cameras in order and ``random.choice`` of the sorted files
    (Cross-Modal-Re-ID-baseline, data_manager.py, process_gallery_sysu; DEEN for LLCM).
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for place, record in enumerate(gallery):
        groups.setdefault((record.person_id, record.camera_id), []).append(place)
    random, drawn = Random(trial), list[int]()
    for person in sorted({person for person, _ in groups}):
        for camera in cameras:
            places = groups.get((person, camera))
            if places:
                drawn.append(random.choice(sorted(places, key=lambda place: gallery[place].path)))
    return np.array(sorted(drawn), dtype=np.int64)
