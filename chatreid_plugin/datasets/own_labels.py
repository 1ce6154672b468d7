"""What a user's own labels mean: splits by their usual names, modalities, junk, and who trains if nothing says so."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import TypeVar

from ..config import SourceSettings
from ..errors import ConfigError, DataError
from ..records import Modality, Split
from .listing import JUNK, JUNK_REASON, Crop, Listing, find_shared_people, keep_captions


Value = TypeVar("Value")

FIELDS = ("person", "camera", "clothes", "modality", "split")
# As Market-1501 (bounding_box_*), VeRi-776 (image_*), SYSU-MM01 (probe) and others call theirs. A test set without
# queries is the gallery that queries are chosen from.
SPLIT_NAMES: dict[str, Split] = {
    **dict.fromkeys(("train", "training", "trainval", "train_set", "bounding_box_train", "image_train"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "val_set"), "val"),
    **dict.fromkeys(("query", "queries", "query_set", "test_query", "image_query", "probe", "probes"), "query"),
    **dict.fromkeys(("gallery", "gallery_set", "test_gallery", "test", "testing", "test_set"), "gallery"),
    **dict.fromkeys(("bounding_box_test", "image_test"), "gallery"),
}
MODALITY_NAMES: dict[str, Modality] = {
    **dict.fromkeys(("visible", "vis", "rgb", "color", "colour"), "visible"),
    **dict.fromkeys(("infrared", "ir", "nir", "thermal"), "infrared"),
}


def make_crop(
    listing: Listing, path: str, labels: Mapping[str, str], where: str, captions: Sequence[str] = ()
) -> Crop | None:
    """Return an image with labels named as in ``FIELDS``, or None, and a count, for junk (identity -1).

    Without a camera the image counts as one of its own, so that nothing is ignored in evaluation.

    Args:
        listing: counts the junk.
        path: of the image, below the listing's root.
        labels: ``person`` and what else is known.
        where: names the place for messages.
        captions: sentences about the person.

    Raises:
        DataError: an unknown split or modality.
    """
    if labels["person"] == JUNK:
        listing.skip(JUNK_REASON)
        return None
    split = _look_up("split", labels.get("split", "train"), SPLIT_NAMES, where)
    return Crop(
        path=path,
        split=split,
        person=labels["person"],
        camera=labels.get("camera", path),
        clothes=labels.get("clothes"),
        modality=_look_up("modality", labels.get("modality", "visible"), MODALITY_NAMES, where),
        captions=keep_captions(listing, captions, split),
    )


def _look_up(field: str, text: str, names: Mapping[str, Value], where: str) -> Value:
    key = re.sub(r"[-\s]+", "_", text.strip().lower())
    if key not in names:
        near = get_close_matches(key, list(names), 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise DataError(f"{where}: {field} {text!r} is unknown.{hint} Known: {', '.join(names)}.")
    return names[key]


def assign_splits(listing: Listing, source: SourceSettings, *, labelled: bool) -> None:
    """Give the listing's crops their splits and warn of what an evaluation would miss.

    If nothing labels the splits, the first ``train_share`` of the sorted identities trains and the rest is tested. Of
    the tested images (those labelled as gallery), the ones of ``query_cameras`` become queries, or the first
    ``queries_per_person`` by path, and the others are the gallery.

    Raises:
        ConfigError: queries are chosen in two ways.
    """
    has_queries = labelled and any(crop.split == "query" for crop in listing.crops)
    choices = [name for name in ("query_cameras", "queries_per_person") if getattr(source, name)]
    if len(choices) + has_queries > 1:
        ways = [*choices, "labels that say query"] if has_queries else choices
        raise ConfigError(f"Source {source.name} has {' and '.join(ways)}; set one of them.")
    if not labelled:
        _share_people(listing, source.train_share)
    elif "train_share" in source.model_fields_set:
        listing.warnings.append("train_share is not used: the labels say who trains")
    if choices:
        _choose_queries(listing, source)
    listing.warnings += [*_find_missing_splits(listing.crops, source), *find_shared_people(listing.crops)]


def _share_people(listing: Listing, share: float) -> None:
    people = sorted({crop.person for crop in listing.crops})
    training = set(people[: round(len(people) * share)])
    listing.crops = [replace(crop, split="train" if crop.person in training else "gallery") for crop in listing.crops]


def _choose_queries(listing: Listing, source: SourceSettings) -> None:
    asked: Counter[str] = Counter()
    crops: list[Crop] = []
    for crop in sorted(listing.crops, key=lambda crop: crop.path):
        first = asked[crop.person] < source.queries_per_person
        if crop.split == "gallery" and (crop.camera in source.query_cameras or first):
            asked[crop.person] += 1
            crop = replace(crop, split="query")
        crops.append(crop)
    listing.crops = crops


def _find_missing_splits(crops: Sequence[Crop], source: SourceSettings) -> list[str]:
    splits = {crop.split for crop in crops}
    cameras = sorted({crop.camera for crop in crops if crop.camera != crop.path})
    found = f"cameras found: {', '.join(cameras[:10])}"
    warnings: list[str] = []
    unknown = [camera for camera in source.query_cameras if camera not in cameras]
    if unknown:
        warnings.append(f"query_cameras names {', '.join(unknown)}, which no image has ({found})")
    if splits & {"query", "gallery"} and not {"query", "gallery"} <= splits:
        missing = "query" if "query" not in splits else "gallery"
        how = f"query_cameras ({found})" if cameras else "queries_per_person, e.g. 1,"
        warnings.append(f"no {missing} images: set {how} to evaluate")
    return warnings
