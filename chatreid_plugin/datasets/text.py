"""The text-to-image sets (shared notes on protocols, sections 2 and 5): one JSON list of described images each."""

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from ..config import SourceSettings
from ..errors import DataError
from ..records import Split
from .json_records import Record, get_identity, get_path, get_texts, read_records
from .listing import JUNK, JUNK_REASON, Crop, Listing, check_files, check_folder, keep_captions


FIELDS = ("split", "captions", "id")
PATH_KEYS = ("file_path", "img_path")
_ADVICE = "Get the published JSON."
SPLITS: dict[str, Split] = {"train": "train", "val": "val", "test": "gallery"}
# The images are MSMT17's: the third field of their name is the camera.
ICFG_NAME = re.compile(
    r"\d{4}_\d{3}_(?P<camera>\d{2})_\d{4}(?:morning|noon|afternoon)_\d{4}_\d+(?:_ex)?\.jpg", re.IGNORECASE | re.ASCII
)
RSTP_NAME = re.compile(r"\d{4}_c(?P<camera>\d{1,2})_\d{4}\.jpg", re.IGNORECASE | re.ASCII)


def list_cuhkpedes(source: SourceSettings) -> Listing:
    """List CUHK-PEDES by ``reid_raw.json``; see ``_list_described``. It names no cameras."""
    return _list_described(source, "CUHK-PEDES", ["reid_raw.json"])


def list_icfgpedes(source: SourceSettings) -> Listing:
    """List ICFG-PEDES by its JSON (its folders ``train`` and ``test`` are MSMT17's); see ``_list_described``."""
    return _list_described(source, "ICFG-PEDES", ["ICFG-PEDES.json", "ICFG_PEDES.json"], ICFG_NAME)


def list_rstpreid(source: SourceSettings) -> Listing:
    """List RSTPReid by ``data_captions.json``; see ``_list_described``."""
    return _list_described(source, "RSTPReid", ["data_captions.json"], RSTP_NAME)


def list_ufine6926(source: SourceSettings) -> Listing:
    """List UFine6926 by its JSON; see ``_list_described``. It names no cameras."""
    return _list_described(source, "UFine6926", [])


def _list_described(
    source: SourceSettings, title: str, names: Sequence[str], camera: re.Pattern[str] | None = None
) -> Listing:
    """List the records of a JSON list with ``split``, ``captions``, ``id`` and ``file_path`` or ``img_path``.

    Test images are split ``gallery``: their captions are the queries. Where ``camera`` does not match a file name,
    the image counts as a camera of its own, so that nothing is ignored in evaluation.

    Raises:
        DataError: no JSON has these fields, a record is wrong, an identity is in two splits, or images are missing.
    """
    check_folder(source.root)
    listing = Listing(source.root)
    labels = _find_labels(source, title, names)
    prefix = "imgs/" if (source.root / "imgs").is_dir() else ""
    crops: dict[str, Crop] = {}
    splits: dict[str, Split] = {}
    for where, record in read_records(labels):
        crop = _read_crop(listing, record, where, prefix, camera)
        if crop.person == JUNK:
            listing.skip(JUNK_REASON)
            continue
        if splits.setdefault(crop.person, crop.split) != crop.split:
            raise DataError(
                f"{where}: identity {crop.person} is in split {crop.split} here and in {splits[crop.person]} before: "
                f"an identity leak inside the data set. {_ADVICE}"
            )
        known = crops.get(crop.path)
        if known is not None:
            if known.person != crop.person:
                raise DataError(
                    f"{where}: {crop.path} is identity {crop.person} here and {known.person} before. {_ADVICE}"
                )
            listing.skip("record of an image named before (captions joined)")
            crop = replace(known, captions=known.captions + crop.captions)
        crops[crop.path] = crop
    listing.crops = list(crops.values())
    check_files(listing, list(crops))
    return listing


def _read_crop(listing: Listing, record: Record, where: str, prefix: str, camera: re.Pattern[str] | None) -> Crop:
    missing = _find_missing(record)
    if missing:
        raise DataError(f"{where}: {', '.join(missing)} missing (found: {', '.join(record)}). {_ADVICE}")
    split = record["split"]
    if not isinstance(split, str) or split.lower() not in SPLITS:
        raise DataError(f"{where}: `split` must be train, val or test, found {split!r}. {_ADVICE}")
    path = get_path(record, next(key for key in PATH_KEYS if key in record), where)
    match = camera.fullmatch(path.rpartition("/")[2]) if camera else None
    return Crop(
        path=prefix + path,
        split=SPLITS[split.lower()],
        person=get_identity(record, "id", where),
        camera=match["camera"] if match else prefix + path,
        captions=keep_captions(listing, get_texts(record, "captions", where), SPLITS[split.lower()]),
    )


def _find_missing(record: Record) -> list[str]:
    missing = [f"`{key}`" for key in FIELDS if key not in record]
    if not any(key in record for key in PATH_KEYS):
        missing.append(f"`{'` or `'.join(PATH_KEYS)}`")
    return missing


def _find_labels(source: SourceSettings, title: str, names: Sequence[str]) -> Path:
    """Return the JSON list that has the fields: ``labels``, one of the published names, or any other of the folder.

    The fields count, not the name: CUHK-PEDES archives hold ``caption_all.json``, which users rename.
    """
    root = source.root
    named = [source.labels] if source.labels else [root / name for name in names if (root / name).is_file()]
    found = named or sorted(path for path in root.glob("*.json") if not path.name.startswith("."))
    reasons: list[str] = []
    fitting: list[Path] = []
    for path in found:
        try:
            first = next(islice(read_records(path), 1), None)
        except DataError as error:
            reasons.append(str(error))
            continue
        missing = _find_missing(first[1]) if first else []
        if first is None:
            reasons.append(f"{path} is an empty list.")
        elif missing:
            reasons.append(f"{path}, record 1: {', '.join(missing)} missing (found: {', '.join(first[1])}).")
        else:
            fitting.append(path)
    if len(fitting) > 1:
        raise DataError(
            f"{root} holds several files that may label {title}: {', '.join(map(str, fitting))}. Name the right "
            "one as the source's `labels`; if the set is in several files, write their lists into one."
        )
    if fitting:
        return fitting[0]
    expected = f"({', '.join(names)}) " if names else ""
    raise DataError(
        f"{root} holds no label file of {title} {expected}with the fields {', '.join(FIELDS)} and "
        f"{' or '.join(PATH_KEYS)}. {' '.join(reasons) or 'There is no JSON file.'} A file without `split` "
        "(such as caption_all.json of CUHK-PEDES) does not say what is trained and what is tested, and renaming it "
        "does not help: get the JSON with the splits from the authors (`chatreid list`)."
    )
