"""Large described sets to train on (shared notes on protocols, section 5): SYNTH-PEDES, LUPerson-MLLM and MALS."""

from collections import Counter
from pathlib import PurePosixPath
from typing import Any, cast

from ..config import SourceSettings
from ..errors import DataError
from ..shards import read_json
from .json_records import ADVICE, Record, describe_type, get_identity, get_path, get_texts, read_records
from .listing import JUNK, JUNK_REASON, Crop, Listing, check_files, find_root, keep_captions


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
    check_files(listing, paths)
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
