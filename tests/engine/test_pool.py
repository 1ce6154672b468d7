"""Tests of chatreid_plugin.engine.pool: columns and codes, several sources, and what the digest notices."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from chatreid_plugin.engine.pool import (
    Groups,
    ImageTable,
    combine_images,
    digest_images,
    draw_among,
    number,
    open_image_table,
    pick,
    view,
    write_image_table,
)
from chatreid_plugin.images import ImagePolicy, count_visual_tokens
from chatreid_plugin.records import ImageRecord
from chatreid_plugin.shards import make_manifest_table, read_manifest_table, write_manifest


ONE = ImageRecord(
    "own/1.jpg",
    "own",
    "train",
    "1.jpg",
    "own:1",
    "c1",
    64,
    128,
    "blue coat",
    "visible",
    ("a man", "tall"),
    {"hat": "cap", "bag": "none"},
)
TWO = replace(ONE, image_id="own/2.jpg", path="2.jpg", camera_id="c2", clothes_id=None, captions=(), attributes={})
OTHER = replace(
    ONE, image_id="b/1.jpg", dataset="b", person_id="b:1", captions=("a woman",), attributes={"hat": "cap"}
)


def make_table(*sources: list[ImageRecord]) -> ImageTable:
    return ImageTable(combine_images([make_manifest_table(records) for records in sources]))


def digest(*records: ImageRecord) -> str:
    return digest_images(make_table(list(records)).table)


def test_columns_are_those_of_the_records() -> None:
    table = make_table([ONE, TWO])
    for name in ("dataset", "path", "person_id", "camera_id", "width", "height", "clothes_id", "modality"):
        assert table.get_column(name).to_pylist() == [getattr(ONE, name), getattr(TWO, name)]
    assert table.captions.to_pylist() == ["a man", "tall"]
    assert table.attributes.to_pylist() == [{"name": "hat", "value": "cap"}, {"name": "bag", "value": "none"}]
    assert table.caption_starts.tolist() == [0, 2, 2]
    assert table.attribute_starts.tolist() == [0, 2, 2]


def test_rows_of_several_sources_follow_each_other() -> None:
    table = make_table([ONE, TWO], [OTHER], [replace(TWO, dataset="c")])
    assert [(source.name, source.first, source.last) for source in table.sources] == [
        ("own", 0, 2),
        ("b", 2, 3),
        ("c", 3, 4),
    ]
    assert table.get_column("dataset").to_pylist() == ["own", "own", "b", "c"]
    assert table.caption_starts.tolist() == [0, 2, 2, 3, 3]
    assert table.attribute_starts.tolist() == [0, 2, 2, 3, 3]
    # Captions and attributes are compared across sources.
    assert table.attribute_codes[0] == table.attribute_codes[2] != table.attribute_codes[1]


def test_codes_are_equal_where_labels_are_and_minus_one_where_there_is_none() -> None:
    table = make_table([ONE, TWO, ONE])
    first, second, third = table.encode("camera_id")
    assert first == third != second
    first, second, third = table.encode("clothes_id")
    assert first == third >= 0 and second == -1


def test_captions_are_equal_where_their_texts_are() -> None:
    table = make_table([ONE, replace(TWO, captions=("tall", "a man", "a man."))])
    a_man, tall, tall_again, a_man_again, dotted = table.caption_codes
    assert (a_man, tall) == (a_man_again, tall_again)
    assert len({a_man, tall, dotted}) == 3


def test_attributes_are_equal_where_name_and_value_are() -> None:
    looks = [{"hat": "red"}, {"bag": "red"}, {"hat": "blue"}, {"bag": "blue"}, {"hat": "red"}]
    codes = make_table([replace(ONE, attributes=look) for look in looks]).attribute_codes.tolist()
    assert codes[0] == codes[4]
    assert len(set(codes)) == 4


def test_looks_are_equal_whatever_the_order_of_attributes() -> None:
    looks: list[dict[str, str]] = [
        {"hat": "cap", "bag": "none"},
        {"bag": "none", "hat": "cap"},
        {"hat": "cap"},
        {"hat": "none", "bag": "cap"},
        {},
        {},
    ]
    codes = make_table([replace(ONE, attributes=look) for look in looks]).looks.tolist()
    assert codes[0] == codes[1]
    assert codes[4] == codes[5]
    assert len(set(codes)) == 4


def test_attribute_of_an_image_without_it_is_minus_one() -> None:
    looks = [{"bag": "red"}, {"hat": "red"}, {}, {"bag": "none", "hat": "blue"}, {"hat": "red", "bag": "red"}]
    codes = make_table([replace(ONE, attributes=look) for look in looks]).encode_attribute("hat").tolist()
    assert (codes[0], codes[2]) == (-1, -1)
    assert codes[1] == codes[4] >= 0
    assert codes[3] not in (-1, codes[1])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_tokens_are_counted_for_every_size_under_the_policy(stage: int) -> None:
    sizes = [(64, 128), (300, 900), (64, 128), (192, 384), (28, 28)]
    policy = ImagePolicy(stage)
    table = make_table([replace(ONE, width=width, height=height) for width, height in sizes])
    assert table.count_tokens(policy).tolist() == [count_visual_tokens(*size, policy) for size in sizes]


def test_text_takes_a_token_for_three_bytes() -> None:
    captions = ("", "ab", "abc", "äöüß" * 3, "穿红衣")
    table = make_table([replace(ONE, captions=captions, attributes={"hat": "red", "a": ""})])
    assert table.caption_tokens.tolist() == [1, 1, 2, 9, 4]
    assert table.attribute_tokens.tolist() == [3, 1]


def test_file_is_mapped_with_all_there_is(tmp_path: Path) -> None:
    table = make_table([ONE, TWO], [OTHER])
    write_image_table(tmp_path / "images.arrow", table.table)
    opened = open_image_table(tmp_path / "images.arrow", digest_images(table.table))
    assert opened.table.equals(table.table)
    assert opened.sources == table.sources
    assert digest_images(opened.table) == digest_images(table.table)
    assert [path.name for path in tmp_path.iterdir()] == ["images.arrow"]


def test_digest_of_a_manifest_is_that_of_its_records(tmp_path: Path) -> None:
    records = [replace(ONE, path=f"{n}.jpg", captions=("a man",) * (n % 3)) for n in range(50)] + [TWO]
    write_manifest(tmp_path / "own.parquet", records, tmp_path, {})
    table, _ = read_manifest_table(tmp_path / "own.parquet")
    assert digest_images(combine_images([table])) == digest(*records)
    # A part of a table lies in its buffers at another place.
    assert digest_images(combine_images([table.slice(10, 20)])) == digest(*records[10:30])


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset": "ow"},
        {"path": "3.jpg"},
        {"person_id": "own:2"},
        {"camera_id": "c3"},
        {"width": 65},
        {"height": 129},
        {"clothes_id": None},
        {"clothes_id": ""},
        {"modality": "infrared"},
        {"captions": ("a man",)},
        {"captions": ("tall", "a man")},
        {"captions": ("a mant", "all")},
        {"captions": ()},
        {"attributes": {"hat": "cap"}},
        {"attributes": {"hat": "none", "bag": "cap"}},
        {"attributes": {"bag": "none", "hat": "cap"}},
        {"attributes": {}},
    ],
)
def test_digest_notices_every_label(changes: dict[str, Any]) -> None:
    assert digest(replace(ONE, **changes), TWO) != digest(ONE, TWO)


@pytest.mark.parametrize(
    "move",
    [
        lambda one, two: [two, one],
        lambda one, two: [one],
        lambda one, two: [one, one],
        lambda one, two: [replace(one, captions=()), replace(two, captions=one.captions)],
        lambda one, two: [replace(one, captions=("a man",)), replace(two, captions=("tall",))],
        lambda one, two: [replace(one, clothes_id=None), replace(two, clothes_id=one.clothes_id)],
    ],
)
def test_digest_notices_what_belongs_to_which_image(move: Callable[..., list[ImageRecord]]) -> None:
    assert digest(*move(ONE, TWO)) != digest(ONE, TWO)


def test_digest_notices_which_images_are_of_which_source() -> None:
    assert digest_images(make_table([ONE, TWO]).table) != digest_images(make_table([ONE], [TWO]).table)


def test_digest_of_images_without_any_description() -> None:
    bare = replace(ONE, captions=(), attributes={}, clothes_id=None)
    assert digest(bare) == digest(bare) != digest(replace(bare, camera_id="c2"))


def test_images_without_any_description_have_codes() -> None:
    bare = replace(ONE, captions=(), attributes={}, clothes_id=None)
    table = make_table([bare, bare])
    assert table.encode("clothes_id").tolist() == [-1, -1]
    assert table.looks.tolist() == [0, 0]
    assert table.encode_attribute("hat").tolist() == [-1, -1]
    assert (len(table.caption_codes), len(table.attribute_codes)) == (0, 0)


@given(st.lists(st.integers(-1, 5), min_size=1))
def test_groups_hold_the_rows_of_a_label_in_order(labels: list[int]) -> None:
    groups = Groups(np.array(labels, dtype=np.int64))
    assert len(groups) == len(set(labels))
    for row, label in enumerate(labels):
        assert list(groups.list_alike(row)) == [i for i, other in enumerate(labels) if other == label]


def test_groups_may_hold_something_else_than_rows() -> None:
    groups = Groups(np.array([7, 3, 7, -1]), np.array([10, 20, 30, 40]))
    assert [list(groups.list_alike(row)) for row in range(4)] == [[10, 30], [20], [10, 30], [40]]


def test_no_rows_have_no_groups() -> None:
    assert len(Groups(np.zeros(0, dtype=np.int64))) == 0


@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(-1, 10**9), st.integers(-1, 1)), min_size=1, max_size=30))
def test_numbers_are_equal_where_all_labels_are(rows: list[tuple[int, int, int]]) -> None:
    numbers = number(*np.array(rows, dtype=np.int64).T).tolist()
    assert set(numbers) == set(range(len(set(rows))))
    assert len(set(zip(rows, numbers, strict=True))) == len(set(rows))


def test_view_gives_plain_integers() -> None:
    numbers = view(np.array([3, 5], dtype=np.int16))
    assert type(numbers[0]) is int
    assert list(numbers[1:]) == [5]


def test_every_option_is_picked_as_often() -> None:
    rng = random.Random(0)
    counts = Counter(pick(rng, view(np.arange(7) * 2)) for _ in range(7000))
    assert set(counts) == set(range(0, 14, 2))
    assert chisquare(list(counts.values())).pvalue > 0.001


@given(
    st.integers(0, 20),
    st.sets(st.integers(0, 19)),
    st.sets(st.integers(0, 19)),
    st.integers(0, 25),
    st.integers(0, 99),
)
def test_draws_are_accepted_options_without_repeats(
    options: int, accepted: set[int], taken: set[int], count: int, seed: int
) -> None:
    chosen = draw_among(random.Random(seed), range(options), accepted.__contains__, count, taken)
    possible = accepted & set(range(options)) - taken
    assert len(chosen) == len(set(chosen)) == min(count, len(possible))
    assert set(chosen) <= possible


@pytest.mark.parametrize("accepted", [range(10), (3, 7, 11)])
def test_every_accepted_option_is_drawn_as_often(accepted: range | tuple[int, ...]) -> None:
    # Few of a hundred options: most draws end with a look at all of them.
    options = range(10) if len(accepted) == 10 else range(100)
    counts = Counter(
        option for seed in range(3000) for option in draw_among(random.Random(seed), options, accepted.__contains__, 2)
    )
    assert sum(counts.values()) == 6000
    assert chisquare([counts[option] for option in accepted]).pvalue > 0.001


def test_search_may_end_early() -> None:
    asked: list[int] = []

    def accept(option: int) -> bool:
        asked.append(option)
        return option == 5000

    assert draw_among(random.Random(0), range(10_000), accept, 2, look_at_all=False) == []
    assert len(asked) < 50
    assert draw_among(random.Random(0), range(10_000), accept, 2) == [5000]
