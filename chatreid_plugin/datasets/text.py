"""Sets whose images are described in sentences: the text-to-image benchmarks, and large sets to train on.

CUHK-PEDES, ICFG-PEDES, RSTPReid and UFine6926 are one JSON list of described images each; SYNTH-PEDES, LUPerson-MLLM
and MALS only train. Shared notes on protocols, sections 2 and 5.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, cast

from ..config import SourceSettings
from ..errors import DataError
from ..records import Split
from ..shards import read_json
from .benchmark import RULES, Benchmark, BenchmarkRules, Choices, Query, Source
from .label_files import ADVICE, Record, describe_type, get_identity, get_path, get_texts, read_records
from .listing import JUNK, JUNK_REASON, Crop, DataSet, Listing, check_files, check_folder, find_root, keep_captions


FIELDS = ("split", "captions", "id")
PATH_KEYS = ("file_path", "img_path")
_ADVICE = "Get the published JSON."
SPLITS: dict[str, Split] = {"train": "train", "val": "val", "test": "gallery"}
# The images are MSMT17's: the third field of their name is the camera.
ICFG_NAME = re.compile(
    r"\d{4}_\d{3}_(?P<camera>\d{2})_\d{4}(?:morning|noon|afternoon)_\d{4}_\d+(?:_ex)?\.jpg", re.IGNORECASE | re.ASCII
)
RSTP_NAME = re.compile(r"\d{4}_c(?P<camera>\d{1,2})_\d{4}\.jpg", re.IGNORECASE | re.ASCII)
# What the comma-separated text of SYNTH-PEDES says, in order (README of Zplusdragon/PLIP).
SYNTHPEDES_ATTRIBUTES = ("gender", "hair", "upper_clothes", "lower_clothes", "shoes", "accessory")
UNKNOWN = "unknown"
# In the order of the authors' code (WentaoTan/MLLM4Text-ReID, datasets/luperson.py).
LUPERSON_CAPTIONS = ("Ts-qwen.json", "Td-qwen.json", "Ts-shikra.json", "Td-shikra.json")
# Left over from the prompt of the captioning model.
LUPERSON_LEFTOVERS = ("description]", "<")
# Name, value of label 0, value of label 1; -1 is unknown (Shuyu-XJTU/APTM, trains.py). For colours, label 0 is yes.
MALS_BINARY = (
    ("gender", "female", "male"),
    ("age", "younger than 18", "older than 18"),
    ("hair_length", "short", "long"),
    ("hat", "yes", "no"),
    ("backpack", "yes", "no"),
    ("handbag", "yes", "no"),
    ("bag", "yes", "no"),
    ("sleeves", "long", "short"),
    ("lower_length", "long", "short"),
    ("lower_type", "dress or skirt", "trousers or shorts"),
)
MALS_UPPER = ("black", "white", "red", "purple", "yellow", "blue", "green", "grey")
MALS_LOWER = ("black", "white", "purple", "yellow", "blue", "green", "pink", "grey", "brown")
MALS_LABELS = len(MALS_BINARY) + len(MALS_UPPER) + len(MALS_LOWER)


def list_described(
    source: SourceSettings, title: str, names: Sequence[str] = (), camera: re.Pattern[str] | None = None
) -> Listing:
    """List the records of a JSON list with ``split``, ``captions``, ``id`` and ``file_path`` or ``img_path``.

    Test images are split ``gallery``: their captions are the queries. Where ``camera`` does not match a file name,
    the image counts as a camera of its own, so that nothing is ignored in evaluation.

    Args:
        source: the data set's folder, and its label file where that has another name.
        title: as its authors write it.
        names: the label file's published names.
        camera: what a file name says of its camera; ICFG-PEDES holds MSMT17's images.

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
    check_files(listing)
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


def load_text(source: Source, choices: Choices) -> Benchmark:
    """CUHK-PEDES, ICFG-PEDES, RSTPReid: every caption asks, every image of the identity matches (IRRA, metrics.py).

    With ``setting: image_to_text`` it is turned round, as there: every image asks, every caption of the identity
    matches.

    Raises:
        DataError: the gallery has no captions.
    """
    captions = [
        replace(record, image_id=f"{record.image_id}#{number}", captions=(caption,))
        for record in source.gallery
        for number, caption in enumerate(record.captions)
        if caption  # the numbers are those of the data set's file, where a caption may be empty
    ]
    if not captions:
        raise DataError(
            f"{source.path}: no gallery image has a caption. Name the captions in the data engine's recipe."
        )
    if choices.setting == "image_to_text":
        turned = replace(source, queries=source.gallery, gallery=captions)
        benchmark = turned.ask_with_images("every image asks, captions are ranked", "nothing")
        return replace(benchmark, ranks_captions=True)
    queries = [Query(record.image_id, record.person_id, text=record.captions[0]) for record in captions]
    variant = f"every caption asks, {RULES['nothing']}"
    return Benchmark(source.name, variant, queries, source.gallery, source.image_root, "nothing")


def list_synthpedes(source: SourceSettings) -> Listing:
    """List SYNTH-PEDES by ``synthpedes_dataset.json``: all of it trains; unknown attributes are left out.

    No cameras: each image counts as one of its own. ``prompt_caption`` only repeats the attributes and is not read.

    Raises:
        DataError: the JSON is missing or a record is wrong, or images are missing.
    """
    name = "synthpedes_dataset.json"
    listing = Listing(find_root(source.root, [name], "SYNTH-PEDES", ["SYNTH-PEDES"]))
    for where, record in read_records(listing.root / name):
        path, person = get_path(record, "file_path", where), get_identity(record, "id", where)
        if person == JUNK:
            listing.skip(JUNK_REASON)
            continue
        captions = keep_captions(listing, get_texts(record, "captions", where), "train")
        values = [value.strip() for value in ",".join(get_texts(record, "attributes", where)[:1]).split(",")]
        attributes: dict[str, str] = {}
        if len(values) == len(SYNTHPEDES_ATTRIBUTES):
            pairs = zip(SYNTHPEDES_ATTRIBUTES, values, strict=True)
            attributes = {key: value for key, value in pairs if value not in ("", UNKNOWN)}
        else:
            listing.skip("attributes that are not six values")
        listing.crops.append(Crop(path, "train", person, path, captions=captions, attributes=attributes))
    return _finish(listing)


def list_lupersonmllm(source: SourceSettings) -> Listing:
    """List LUPerson-MLLM: every image is an identity and a camera of its own, with up to four captions.

    The four files of ``caption`` are objects from image path to caption; only the file name of the path counts.

    Raises:
        DataError: a caption file is missing or wrong, or images are missing.
    """
    files = [f"caption/{name}" for name in LUPERSON_CAPTIONS]
    listing = Listing(find_root(source.root, ["LUPerson-MLLM", *files], "LUPerson-MLLM"))
    captions: dict[str, list[str]] = {}
    for file in files:
        path = listing.root / file
        content = read_json(path)
        if not isinstance(content, dict):
            raise DataError(f"{path} must hold an object from image path to caption. {ADVICE}")
        for key, caption in cast(dict[str, Any], content).items():
            if not isinstance(caption, str):
                raise DataError(f"{path}, {key!r}: expected a caption, found {describe_type(caption)}. {ADVICE}")
            captions.setdefault(PurePosixPath(key).name, []).append(caption)
    for name, texts in captions.items():
        clean = [text for text in texts if not any(mark in text for mark in LUPERSON_LEFTOVERS)]
        if len(clean) < len(texts):
            listing.skip("caption with leftovers of its prompt", len(texts) - len(clean))
        path = f"LUPerson-MLLM/{name}"
        person = PurePosixPath(name).stem
        listing.crops.append(Crop(path, "train", person, path, captions=keep_captions(listing, clean, "train")))
    return _finish(listing)


def list_mals(source: SourceSettings) -> Listing:
    """List MALS by all JSON files of ``gene_attrs``: every image is an identity and a camera of its own.

    Raises:
        DataError: there is no JSON file, a record is wrong, or images are missing.
    """
    listing = Listing(find_root(source.root, ["gene_crop", "gene_attrs"], "MALS", ["MALS"]))
    folder = listing.root / "gene_attrs"
    files = sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))
    if not files:
        raise DataError(f"{folder} holds no JSON file, such as g_c_g_a_0_attrs.json. {ADVICE}")
    for file in files:
        for where, record in read_records(file):
            path, person = get_path(record, "image", where), get_identity(record, "image_id", where)
            captions = keep_captions(listing, get_texts(record, "caption", where), "train")
            attributes = _read_mals_attributes(record, where)
            listing.crops.append(Crop(path, "train", person, path, captions=captions, attributes=attributes))
    return _finish(listing)


def _finish(listing: Listing) -> Listing:
    paths = [crop.path for crop in listing.crops]
    if len(set(paths)) < len(paths):
        (path, count), *_ = Counter(paths).most_common(1)
        raise DataError(f"{listing.root}: the labels name {path} {count} times. {ADVICE}")
    check_files(listing)
    return listing


def _read_mals_attributes(record: Record, where: str) -> dict[str, str]:
    labels = record.get("label")
    if not isinstance(labels, list) or len(cast(list[Any], labels)) != MALS_LABELS:
        raise DataError(f"{where}: `label` must be a list of {MALS_LABELS} numbers. {ADVICE}")
    values = cast(list[Any], labels)
    if any(not isinstance(value, int) or value not in (-1, 0, 1) for value in values):
        raise DataError(f"{where}: `label` must hold 0, 1 and -1 only. {ADVICE}")
    split = len(MALS_BINARY)
    pairs = zip(MALS_BINARY, values[:split], strict=True)
    attributes = {name: (no, yes)[value] for (name, no, yes), value in pairs if value != -1}
    for name, colours, start in (
        ("upper_colour", MALS_UPPER, split),
        ("lower_colour", MALS_LOWER, split + len(MALS_UPPER)),
    ):
        worn = [colour for colour, value in zip(colours, values[start:], strict=False) if value == 0]
        if worn:
            attributes[name] = " and ".join(worn)
    return attributes


def _make_rules(dataset: str, captions: int, images: int) -> BenchmarkRules:
    return BenchmarkRules(
        load_text,
        dataset,
        choices={"setting": ("text_to_image", "image_to_text")},
        sizes={("text_to_image",): (captions, images), ("image_to_text",): (images, captions)},
        queries_apart=False,
        asks_in_words=True,
    )


def _describe_set(title: str, *names: str, camera: re.Pattern[str] | None = None) -> DataSet:
    return DataSet(partial(list_described, title=title, names=names, camera=camera), keys=("labels",))


DATASETS = {
    "cuhkpedes": _describe_set("CUHK-PEDES", "reid_raw.json"),
    "icfgpedes": _describe_set("ICFG-PEDES", "ICFG-PEDES.json", "ICFG_PEDES.json", camera=ICFG_NAME),
    "rstpreid": _describe_set("RSTPReid", "data_captions.json", camera=RSTP_NAME),
    "ufine6926": _describe_set("UFine6926"),
    "synthpedes": DataSet(list_synthpedes),
    "lupersonmllm": DataSet(list_lupersonmllm),
    "mals": DataSet(list_mals),
}
BENCHMARKS = {
    "cuhkpedes": _make_rules("cuhkpedes", captions=6156, images=3074),
    "icfgpedes": _make_rules("icfgpedes", captions=19848, images=19848),
    "rstpreid": _make_rules("rstpreid", captions=2000, images=1000),
}
