"""PA-100K, PETA and RAP v1 and v2: pictures, and their binary attributes in MATLAB files as published."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import savemat

from ...records import Split
from ..people import Person
from .renderer import Layout, Renderer


PEOPLE, CAMERAS, TRIALS = 6, 2, 5


@dataclass(frozen=True, slots=True)
class Label:
    """A published binary attribute and what it has to become.

    Attributes:
        published: its name in the file.
        key: the synthetic person's attribute that decides it; none decides if empty, and the label is 0.
        word: what that attribute's value has to contain.
        name: of the attribute that a parser makes of it; empty where it has to leave it out.
        value: of that attribute.
    """

    published: str
    key: str = ""
    word: str = ""
    name: str = ""
    value: str = ""

    def applies_to(self, person: Person) -> bool:
        """Return whether the person has the attribute."""
        # "shirt" is no "t-shirt".
        return bool(self.key) and f" {self.word}" in f" {person.attributes[self.key]}"


# In published order.
PA100K_LABELS = (
    Label("Female", "gender", "female", "gender", "female"),
    Label("AgeOver60", "age", "elderly", "age", "over 60"),
    Label("Age18-60", "age", "middle", "age", "18 to 60"),
    Label("AgeLess18", "age", "young", "age", "under 18"),
    Label("Front"),
    Label("Side"),
    Label("Back"),
    Label("Hat", "hat", "white hat", "accessory", "hat"),
    Label("Glasses"),
    Label("HandBag", "bag", "handbag", "bag", "hand bag"),
    Label("ShoulderBag", "bag", "shoulder", "bag", "shoulder bag"),
    Label("Backpack", "bag", "backpack", "bag", "backpack"),
    Label("HoldObjectsInFront"),
    Label("ShortSleeve", "upper_type", "t-shirt", "sleeves", "short"),
    Label("LongSleeve", "upper_type", "sweater", "sleeves", "long"),
    Label("UpperStride", "upper_pattern", "striped", "upper", "striped"),
    Label("UpperLogo", "upper_pattern", "logo", "upper", "logo"),
    Label("UpperPlaid", "upper_pattern", "checked", "upper", "plaid"),
    Label("UpperSplice"),
    Label("LowerStripe"),
    Label("LowerPattern"),
    Label("LongCoat"),
    Label("Trousers", "lower_type", "trousers", "lower", "trousers"),
    Label("Shorts", "lower_type", "shorts", "lower", "shorts"),
    Label("Skirt&Dress", "lower_type", "skirt", "lower", "skirt or dress"),
    Label("boots", "shoes", "brown boots", "shoes", "boots"),
)
PETA_LABELS = (
    Label("personalLess30", "age", "young", "age", "16 to 30"),
    Label("personalLess45", "age", "middle", "age", "31 to 45"),
    Label("personalLarger60", "age", "elderly", "age", "over 60"),
    Label("carryingBackpack", "bag", "backpack", "bag", "backpack"),
    Label("lowerBodyJeans", "lower_type", "jeans", "lower", "jeans"),
    Label("accessoryHat", "hat", "white hat", "accessory", "hat"),
    Label("upperBodyThinStripes", "upper_pattern", "striped", "upper", "thin stripes"),
    Label("upperBodyTshirt", "upper_type", "t-shirt", "upper", "tshirt"),
    Label("upperBodyVNeck"),
    Label("personalMale", "gender", "male", "gender", "male"),
    Label("upperBodyRed", "upper_colour", "red", "upper_colour", "red"),
    Label("lowerBodyBlack", "lower_colour", "black", "lower_colour", "black"),
    Label("hairShort", "hair", "short", "hair", "short"),
    Label("personalFemale", "gender", "female", "gender", "female"),
)
RAPV1_LABELS = (
    Label("Female", "gender", "female", "gender", "female"),
    Label("AgeLess16"),
    Label("Age17-30", "age", "young", "age", "17 to 30"),
    Label("Age31-45", "age", "middle", "age", "31 to 45"),
    Label("BodyNormal"),
    Label("Customer", "gender", "male"),
    Label("hs-LongHair", "hair", "long", "hair", "long"),
    Label("ub-TShirt", "upper_type", "t-shirt", "upper", "t shirt"),
    Label("ub-Jacket", "upper_type", "jacket", "upper", "jacket"),
    Label("lb-Jeans", "lower_type", "jeans", "lower", "jeans"),
    Label("shoes-Boots", "shoes", "brown boots", "shoes", "boots"),
    Label("attach-HandBag", "bag", "brown handbag", "bag", "hand bag"),
    Label("action-Pusing"),
    Label("occlusionLeft", "age", "young"),
    Label("up-Gray", "upper_colour", "grey", "upper_colour", "grey"),
    Label("low-Blue", "lower_colour", "blue", "lower_colour", "blue"),
)
RAPV2_LABELS = (
    Label("Femal", "gender", "female", "gender", "female"),
    Label("Age46-60", "age", "elderly", "age", "46 to 60"),
    Label("Employee", "gender", "male"),
    Label("hs-BlackHair", "hair", "short black", "hair_colour", "black"),
    Label("ub-SuitUp"),
    Label("ub-Shirt", "upper_type", "shirt", "upper", "shirt"),
    Label("ub-ColorBlack", "upper_colour", "black", "upper_colour", "black"),
    Label("up-ColorRed", "upper_colour", "red", "upper_colour", "red"),
    Label("lb-Skirt", "lower_type", "skirt", "lower", "skirt"),
    Label("lb-ColorGray", "lower_colour", "grey", "lower_colour", "grey"),
    Label("shoes-Sports", "shoes", "white sneakers", "shoes", "sports"),
    Label("attachment-Backpack", "bag", "black backpack", "bag", "backpack"),
)


def _expect(labels: Sequence[Label], person: Person) -> dict[str, str]:
    """Return what a parser has to find; who is not labelled female is male where only that is labelled."""
    found: dict[str, str] = {}
    for label in labels:
        if label.name and label.applies_to(person):
            found[label.name] = f"{found[label.name]} and {label.value}" if label.name in found else label.value
    if labels[0].published.startswith("Femal"):
        found.setdefault("gender", "male")
    return found


def _make_matrix(labels: Sequence[Label], people: Sequence[Person]) -> np.ndarray:
    return np.array([[label.applies_to(person) for label in labels] for person in people], dtype=np.uint8)


def _make_cells(values: Sequence[Any], *, column: bool = True) -> np.ndarray:
    """Return a MATLAB cell array of one column, or of one row."""
    cells = np.empty((len(values), 1), dtype=object)
    for index, value in enumerate(values):
        cells[index, 0] = value
    return cells if column else cells.T


def _split_indices(trial: int, splits: Sequence[Split], count: int) -> dict[Split, np.ndarray]:
    """Return indices from 1: the images in another order for each trial, dealt out to the splits in turn."""
    order = np.roll(np.arange(1, count + 1), trial)
    return {split: np.sort(order[index :: len(splits)]) for index, split in enumerate(splits)}


def write_pa100k(root: Path, seed: int = 0) -> Layout:
    """Write ``data`` and ``annotation.mat``: neither identities nor cameras, a list of images for each split."""
    layout, renderer = Layout(root), Renderer("pa100k", seed)
    columns = _make_cells([label.published for label in PA100K_LABELS])
    file: dict[str, Any] = {"attributes": columns}
    parts: tuple[tuple[str, Split], ...] = (("train", "train"), ("val", "val"), ("test", "gallery"))
    number = 0
    for name, split in parts:
        people = [renderer.get_person(number + index) for index in range(1, 4)]
        images: list[str] = []
        for person in people:
            number += 1
            images.append(f"{number:06d}.jpg")
            image, _ = renderer.render(number, 1, 0)
            path, attributes = f"data/{images[-1]}", _expect(PA100K_LABELS, person)
            renderer.add(layout, image, path, split=split, person=f"{number:06d}", camera=path, attributes=attributes)
        file[f"{name}_images_name"] = _make_cells(images)
        file[f"{name}_label"] = _make_matrix(PA100K_LABELS, people)
    savemat(root / "annotation.mat", file)
    return layout


def write_peta(root: Path, seed: int = 0) -> Layout:
    """Write ``images`` and ``PETA.mat``: four columns before the attributes, five random splits as index columns."""
    layout, renderer = Layout(root), Renderer("peta", seed)
    people = [renderer.get_person(number) for number in range(1, PEOPLE + 1)]
    trials = [_split_indices(trial, ("train", "val", "gallery"), PEOPLE) for trial in range(TRIALS)]
    splits: dict[int, Split] = {int(index): split for split, indices in trials[0].items() for index in indices}
    for number, person in enumerate(people, 1):
        image, _ = renderer.render(number, 1, 0)
        path, attributes = f"images/{number:05d}.png", _expect(PETA_LABELS, person)
        renderer.add(
            layout,
            image,
            path,
            split=splits[number],
            person=f"{number:05d}",
            camera=path,
            attributes=attributes,
        )
    partition = [
        {
            "train_index": trial["train"][:, None],
            "val_index": trial["val"][:, None],
            "test_index": trial["gallery"][:, None],
        }
        for trial in trials
    ]
    first = np.arange(PEOPLE)[:, None].repeat(4, axis=1)
    structure = {
        "data": np.hstack([first, _make_matrix(PETA_LABELS, people)]),
        "attribute": _make_cells([label.published for label in PETA_LABELS]),
        "selected_attribute": np.arange(1, len(PETA_LABELS) + 1),
        "partition": _make_cells(partition),
    }
    savemat(root / "PETA.mat", {"peta": structure})
    return layout


def _render_rap(renderer: Renderer, number: int, camera: int) -> tuple[Any, str]:
    image, _ = renderer.render(number, camera, 0)
    return image, f"CAM{camera:02d}-2014-02-15-20140215161032-20140215162620-tarid{number}-frame218-line1.png"


def write_rapv1(root: Path, seed: int = 0) -> Layout:
    """Write ``RAP_dataset`` and its annotation: cameras in the file names, no identities, no validation set."""
    layout, renderer = Layout(root), Renderer("rapv1", seed)
    trials = [_split_indices(trial, ("train", "gallery"), PEOPLE * CAMERAS) for trial in range(TRIALS)]
    splits: dict[int, Split] = {int(index): split for split, indices in trials[0].items() for index in indices}
    people: list[Person] = []
    names: list[str] = []
    for number, camera in product(range(1, PEOPLE + 1), range(1, CAMERAS + 1)):
        image, name = _render_rap(renderer, number, camera)
        people.append(renderer.get_person(number))
        names.append(name)
        renderer.add(
            layout,
            image,
            f"RAP_dataset/{name}",
            split=splits[len(names)],
            person=name.removesuffix(".png"),
            camera=f"{camera:02d}",
            attributes=_expect(RAPV1_LABELS, people[-1]),
        )
    published = _make_cells([label.published for label in RAPV1_LABELS])
    structure = {
        "partition": _make_cells([{"train_index": t["train"], "test_index": t["gallery"]} for t in trials]),
        "label": _make_matrix(RAPV1_LABELS, people),
        "attribute_chinese": published,
        "attribute_eng": published,
        "position": np.zeros((len(names), 16)),
        "imagesname": _make_cells(names),
        "attribute_exp": published,
    }
    _save_rap(root, structure)
    return layout


def write_rapv2(root: Path, seed: int = 0) -> Layout:
    """Write RAP v2: half of the people have a number, the others -1; splits with a validation set."""
    layout, renderer = Layout(root), Renderer("rapv2", seed)
    trials = [_split_indices(trial, ("train", "val", "gallery"), PEOPLE * CAMERAS) for trial in range(TRIALS)]
    splits: dict[int, Split] = {int(index): split for split, indices in trials[0].items() for index in indices}
    people: list[Person] = []
    names: list[str] = []
    identities: list[int] = []
    for number, camera in product(range(1, PEOPLE + 1), range(1, CAMERAS + 1)):
        image, name = _render_rap(renderer, number, camera)
        people.append(renderer.get_person(number))
        names.append(name)
        identities.append(number if number <= PEOPLE // 2 else -1)
        renderer.add(
            layout,
            image,
            f"RAP_dataset/{name}",
            split=splits[len(names)],
            person=str(number) if identities[-1] > 0 else name.removesuffix(".png"),
            camera=f"{camera:02d}",
            attributes=_expect(RAPV2_LABELS, people[-1]),
        )
    partition = [
        {"train_index": trial["train"], "val_index": trial["val"], "test_index": trial["gallery"]} for trial in trials
    ]
    structure = {
        "name": _make_cells(names),
        "attribute": _make_cells([label.published for label in RAPV2_LABELS]),
        "data": _make_matrix(RAPV2_LABELS, people),
        "selected_attribute": np.arange(1, len(RAPV2_LABELS) + 1),
        "person_identity": np.array(identities)[:, None],
        "partition_attribute": _make_cells(partition, column=False),
    }
    _save_rap(root, structure)
    return layout


def _save_rap(root: Path, structure: dict[str, Any]) -> None:
    (root / "RAP_annotation").mkdir()
    savemat(root / "RAP_annotation" / "RAP_annotation.mat", {"RAP_annotation": structure})


LAYOUTS = {
    "pa100k": write_pa100k,
    "peta": write_peta,
    "rapv1": write_rapv1,
    "rapv2": write_rapv2,
}
