"""The layouts of the described sets: the four text-to-image sets, SYNTH-PEDES, LUPerson-MLLM and MALS."""

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ...records import Split
from ..people import Person
from .msmt17 import list_shots
from .renderer import Layout, Renderer


SPLITS: dict[str, Split] = {"train": "train", "val": "val", "test": "gallery"}
CUHK_FOLDERS = ("cam_a", "cam_b", "CUHK01", "CUHK03", "Market", "test_query", "train_query")


@dataclass(frozen=True, slots=True)
class _Shot:
    """One image of a plan: whose it is, where it lies below the image folder, and which camera the name tells.

    ``looks`` is the person whom the renderer shows, if that is not the next of its world.
    """

    split: str
    person: int
    camera: int
    index: int
    path: str
    camera_id: str | None = None
    looks: int | None = None


def write_cuhkpedes(root: Path, seed: int = 0) -> Layout:
    """Write ``reid_raw.json`` and ``imgs``; one record has an empty caption besides."""
    people = {1: "train", 2: "train", 3: "train", 4: "val", 5: "test", 6: "test"}
    shots: list[_Shot] = []
    for (person, split), index in product(people.items(), range(2)):
        folder = CUHK_FOLDERS[(2 * person + index) % len(CUHK_FOLDERS)]
        shots.append(_Shot(split, person, index + 1, index, f"{folder}/{person:04d}_{index:03d}.jpg"))
    return _write_described(root, Renderer("cuhkpedes", seed), shots, "reid_raw.json", "file_path", empty_captions=1)


def write_icfgpedes(root: Path, seed: int = 0) -> Layout:
    """Write ``ICFG-PEDES.json`` and ``imgs``: images of MSMT17 under its names, two of four test people for training.

    The folders are MSMT17's halves, which say nothing about ICFG-PEDES's own splits; one caption for each image.
    """
    plan = {("test", 0): (0, "train"), ("train", 1): (1, "train"), ("test", 1): (2, "test"), ("train", 2): (3, "test")}
    shots: list[_Shot] = []
    for published in list_shots():
        folder = "test" if published.split in ("query", "gallery") else "train"
        person, split = plan.get((folder, published.person), (None, ""))
        if person is not None:
            path, camera = f"{folder}/{published.name}", f"{published.camera:02d}"
            shots.append(_Shot(split, person, published.camera, published.index, path, camera, published.looks))
    renderer = Renderer("icfgpedes", seed, world="msmt17")
    return _write_described(root, renderer, shots, "ICFG-PEDES.json", "file_path", captions=1)


def write_rstpreid(root: Path, seed: int = 0) -> Layout:
    """Write ``data_captions.json`` and ``imgs``: five images of each identity, by five cameras, two captions each."""
    people = {0: "train", 1: "train", 2: "val", 3: "test", 4: "test"}
    shots = [
        _Shot(split, person, camera, 0, f"{person:04d}_c{camera}_{30 + camera:04d}.jpg", str(camera))
        for (person, split), camera in product(people.items(), (1, 5, 7, 11, 14))
    ]
    return _write_described(root, Renderer("rstpreid", seed), shots, "data_captions.json", "img_path")


def write_ufine6926(root: Path, seed: int = 0) -> Layout:
    """Write a JSON list and ``images``."""
    people = {1: "train", 2: "train", 3: "test"}
    shots = [
        _Shot(split, person, 1 + index, index, f"images/{3 * (person - 1) + index + 1}.jpg")
        for (person, split), index in product(people.items(), range(3))
    ]
    return _write_described(root, Renderer("ufine6926", seed), shots, "annotations.json", "file_path", prefix="")


def _write_described(
    root: Path,
    renderer: Renderer,
    shots: list[_Shot],
    file: str,
    path_key: str,
    *,
    prefix: str = "imgs/",
    captions: int = 2,
    empty_captions: int = 0,
) -> Layout:
    layout = Layout(root)
    records: list[dict[str, Any]] = []
    for shot in shots:
        image, described = renderer.render(shot.looks or shot.person + 1, shot.camera, shot.index)
        path = prefix + shot.path
        renderer.add(
            layout,
            image,
            path,
            split=SPLITS[shot.split],
            person=str(shot.person),
            camera=shot.camera_id or path,
            captions=described[:captions],
        )
        # The published lists also hold the captions' words.
        words = [caption.lower().split() for caption in described[:captions]]
        record = {"split": shot.split, "id": shot.person, path_key: shot.path, "processed_tokens": words}
        records.append(record | {"captions": list(described[:captions])})
    if empty_captions:
        records[0]["captions"] += [" "] * empty_captions
        layout.skipped["empty caption"] = empty_captions
    (root / file).write_text(json.dumps(records), encoding="utf-8")
    return layout


# Order of the colours in MALS's labels; the synthetic people also wear others, which have no label.
MALS_UPPER = ("black", "white", "red", "purple", "yellow", "blue", "green", "grey")
MALS_LOWER = ("black", "white", "purple", "yellow", "blue", "green", "pink", "grey", "brown")


def write_synthpedes(root: Path, seed: int = 0) -> Layout:
    """Write ``synthpedes_dataset.json`` and two parts; an accessory is sometimes unknown, one text is malformed."""
    layout, renderer = Layout(root), Renderer("synthpedes", seed)
    records: list[dict[str, Any]] = []
    for person, index in product(range(1, 5), range(1, 3)):
        image, captions = renderer.render(person, person % 3 + 1, index)
        values = renderer.get_person(person).attributes
        attributes = {
            "gender": "man" if values["gender"] == "male" else "woman",
            "hair": values["hair"],
            "upper_clothes": f"{values['upper_colour']} {values['upper_type']}",
            "lower_clothes": f"{values['lower_colour']} {values['lower_type']}",
            "shoes": values["shoes"],
        }
        path = f"Part{1 + person % 2}/{person}/{index}.jpg"
        malformed = (person, index) == (4, 2)
        texts = [*attributes.values(), values["bag"] if person == 2 else "unknown"]
        known = attributes | ({"accessory": values["bag"]} if person == 2 else {})
        renderer.add(
            layout,
            image,
            path,
            split="train",
            person=str(person),
            camera=path,
            captions=captions,
            attributes={} if malformed else known,
        )
        record = {"id": person, "file_path": path, "attributes": [",".join(texts[:5] if malformed else texts)]}
        records.append(record | {"captions": list(captions), "prompt_caption": ["A person with shoes."]})
    layout.skipped["attributes that are not six values"] = 1
    (root / "synthpedes_dataset.json").write_text(json.dumps(records), encoding="utf-8")
    return layout


def write_lupersonmllm(root: Path, seed: int = 0) -> Layout:
    """Write ``LUPerson-MLLM`` and four caption files; two captions are leftovers of the captioning model's prompt."""
    layout, renderer = Layout(root), Renderer("lupersonmllm", seed)
    files: dict[str, dict[str, str]] = {}
    for person in range(1, 5):
        image, first = renderer.render(person, 1, 0)
        _, second = renderer.render(person, 1, 2)
        name = f"{person:06d}.jpg"
        captions = dict(zip(("Ts-qwen", "Td-qwen", "Ts-shikra", "Td-shikra"), (*first, *second), strict=True))
        kept = dict(captions)
        if person == 2:
            captions["Td-qwen"] = "[insert description] of the person"
            captions["Td-shikra"] = "A man <p>"
            kept = {key: caption for key, caption in captions.items() if not key.startswith("Td")}
        for key, caption in captions.items():
            files.setdefault(key, {})[f"/somewhere/LUPerson/{name}"] = caption
        path = f"LUPerson-MLLM/{name}"
        renderer.add(layout, image, path, split="train", person=name[:-4], camera=path, captions=tuple(kept.values()))
    (root / "caption").mkdir()
    for key, content in files.items():
        (root / "caption" / f"{key}.json").write_text(json.dumps(content), encoding="utf-8")
    layout.skipped["caption with leftovers of its prompt"] = 2
    return layout


def write_mals(root: Path, seed: int = 0) -> Layout:
    """Write two folders of ``gene_crop`` and their label files in ``gene_attrs``."""
    layout, renderer = Layout(root), Renderer("mals", seed)
    (root / "gene_attrs").mkdir(parents=True)
    for folder in ("c_g_a_0", "i_g_a_43"):
        records: list[dict[str, Any]] = []
        for index in range(3):
            number = 1 + index + (3 if folder == "i_g_a_43" else 0)
            image, captions = renderer.render(number, 1, index)
            labels, attributes = _label_mals(renderer.get_person(number))
            path = f"gene_crop/{folder}/{index}.jpg"
            renderer.add(
                layout,
                image,
                path,
                split="train",
                person=f"{folder}_{index}",
                camera=path,
                captions=captions[:1],
                attributes=attributes,
            )
            record = {"image": path, "caption": captions[0], "image_id": f"{folder}_{index}", "label": labels}
            records.append(record)
        (root / "gene_attrs" / f"g_{folder}_attrs.json").write_text(json.dumps(records), encoding="utf-8")
    return layout


def _label_mals(person: Person) -> tuple[list[int], dict[str, str]]:
    """Return the 27 labels of a person and what they mean; -1 where the synthetic world does not say."""
    looks = person.attributes
    long_hair, short_legs = looks["hair"].startswith("long"), looks["lower_type"] in ("shorts", "skirt")
    hat, backpack, handbag = looks["hat"] != "no hat", "backpack" in looks["bag"], "handbag" in looks["bag"]
    labels = [looks["gender"] == "male", 1, long_hair, not hat, not backpack, not handbag, -1, -1, short_legs]
    labels += [looks["lower_type"] != "skirt"]
    labels += [looks["upper_colour"] != colour for colour in MALS_UPPER]
    labels += [looks["lower_colour"] != colour for colour in MALS_LOWER]
    attributes = {
        "gender": looks["gender"],
        "age": "older than 18",
        "hair_length": "long" if long_hair else "short",
        "hat": "yes" if hat else "no",
        "backpack": "yes" if backpack else "no",
        "handbag": "yes" if handbag else "no",
        "lower_length": "short" if short_legs else "long",
        "lower_type": "dress or skirt" if looks["lower_type"] == "skirt" else "trousers or shorts",
    }
    for name, colours in (("upper_colour", MALS_UPPER), ("lower_colour", MALS_LOWER)):
        if looks[name] in colours:
            attributes[name] = looks[name]
    return [int(label) for label in labels], attributes


LAYOUTS = {
    "cuhkpedes": write_cuhkpedes,
    "icfgpedes": write_icfgpedes,
    "rstpreid": write_rstpreid,
    "ufine6926": write_ufine6926,
    "synthpedes": write_synthpedes,
    "lupersonmllm": write_lupersonmllm,
    "mals": write_mals,
}
