"""Tests of chatreid_plugin.engine.screening.quality: which images go, for which reason, and which copy stays."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from chatreid_plugin.config import QualitySettings, SourceSettings
from chatreid_plugin.demo.world import WorldSummary
from chatreid_plugin.engine.parsing import parse_source
from chatreid_plugin.engine.screening.quality import Drop, filter_records
from chatreid_plugin.records import ImageRecord


OFF = QualitySettings.model_validate(dict.fromkeys(QualitySettings.model_fields.keys() - {"stages"}))
TEXTURED = int("f0" * 32, 16)


def flip(*bits: int) -> str:
    """Return a hash that differs from TEXTURED in these bits."""
    return f"{TEXTURED ^ sum(1 << bit for bit in bits):064x}"


def make_record(number: int, person: str = "1", dataset: str = "own", **changes: Any) -> ImageRecord:
    record = ImageRecord(
        f"{dataset}/{number}.jpg", dataset, "train", f"{number}.jpg", f"{dataset}:{person}", "1", 64, 128,
        sharpness=100.0, brightness=100.0,
    )  # fmt: skip
    return replace(record, **changes)


def list_drops(records: list[ImageRecord], settings: QualitySettings) -> list[tuple[str, str, float]]:
    return [(drop.record.path, drop.reason, drop.value) for drop in filter_records(records, settings).dropped]


@pytest.mark.parametrize(
    ("changes", "reason", "value"),
    [
        ({"width": 15, "height": 40}, "min_width", 15),
        ({"width": 30, "height": 31}, "min_height", 31),
        ({"width": 100, "height": 90}, "min_aspect", 0.9),
        ({"width": 20, "height": 120}, "max_aspect", 6),
        ({"sharpness": 2.9}, "min_sharpness", 2.9),
        ({"brightness": 14.5}, "min_brightness", 14.5),
        ({"brightness": 241.0}, "max_brightness", 241.0),
    ],
)
def test_poor_image_goes_for_its_reason(changes: dict[str, Any], reason: str, value: float) -> None:
    good, poor = make_record(0), make_record(1, **changes)
    result = filter_records([good, poor], QualitySettings())
    assert result.kept == [good]
    assert result.dropped == [Drop(poor, reason, value)]
    assert filter_records([poor], QualitySettings.model_validate({reason: None})).kept == [poor]


def test_value_at_the_limit_stays() -> None:
    limits = {"width": 16, "height": 32, "sharpness": 3.0, "brightness": 15.0}
    records = [make_record(0, **limits), make_record(1, width=32, height=32), make_record(2, width=20, height=100)]
    assert filter_records(records, QualitySettings()).kept == records


def test_image_with_several_faults_is_counted_once_for_the_first() -> None:
    record = make_record(0, width=8, height=8, sharpness=0.0, brightness=0.0)
    assert list_drops([record], QualitySettings()) == [("0.jpg", "min_width", 8)]
    assert list_drops([record], QualitySettings(min_width=None, min_height=None)) == [("0.jpg", "min_sharpness", 0)]


def test_what_was_not_measured_passes() -> None:
    records = [make_record(n, width=0, height=0, sharpness=None, brightness=None) for n in range(3)]
    assert filter_records(records, QualitySettings(near_duplicate_bits=15)).kept == records


def test_no_check_drops_anything_when_all_are_off() -> None:
    records = [make_record(n, width=1, height=1, sharpness=0, perceptual_hash=flip()) for n in range(3)]
    assert filter_records(records, OFF).kept == records


def test_copy_of_an_earlier_image_of_the_identity_goes() -> None:
    records = [
        make_record(0, perceptual_hash=flip()),
        make_record(1, perceptual_hash=flip(3, 200)),
        make_record(2, perceptual_hash=flip(1, 2, 3, 4, 5, 6, 7, 8, 9)),
        make_record(3, "2", perceptual_hash=flip()),
        make_record(4, perceptual_hash=flip()),
        make_record(5, "1", "other", perceptual_hash=flip()),
        make_record(6, perceptual_hash=flip(3, 200)),
    ]
    assert list_drops(records, QualitySettings()) == [
        ("1.jpg", "near_duplicate_bits", 2),
        ("4.jpg", "near_duplicate_bits", 0),
        ("6.jpg", "near_duplicate_bits", 2),
    ]


@pytest.mark.parametrize(("bits", "gone"), [(0, ["2.jpg"]), (1, ["2.jpg"]), (2, ["1.jpg", "2.jpg"]), (None, [])])
def test_number_of_bits_says_what_a_copy_is(bits: int | None, gone: list[str]) -> None:
    records = [make_record(n, perceptual_hash=flip(*places)) for n, places in enumerate([(), (1, 2), ()])]
    drops = list_drops(records, QualitySettings(near_duplicate_bits=bits))
    assert [path for path, _, _ in drops] == gone


def test_copy_of_a_copy_stays_when_it_is_far_from_the_image_kept() -> None:
    records = [make_record(n, perceptual_hash=flip(*range(6 * n))) for n in range(4)]
    drops = list_drops(records, QualitySettings(near_duplicate_bits=8))
    assert drops == [("1.jpg", "near_duplicate_bits", 6), ("3.jpg", "near_duplicate_bits", 6)]


def test_copy_of_an_image_dropped_for_another_reason_stays() -> None:
    blurred = make_record(0, sharpness=2.0, perceptual_hash=flip())
    sharp = make_record(1, perceptual_hash=flip())
    assert filter_records([blurred, sharp], QualitySettings()).kept == [sharp]


def test_copies_go_across_identities_when_every_identity_has_one_image() -> None:
    single = [make_record(n, str(n), "luperson", perceptual_hash=flip(n)) for n in range(3)]
    several = [make_record(3, "a", perceptual_hash=flip()), make_record(4, "b", perceptual_hash=flip())]
    several.append(make_record(5, "b", perceptual_hash=flip(*range(40))))
    drops = list_drops([*single, *several], QualitySettings())
    assert drops == [("1.jpg", "near_duplicate_bits", 2), ("2.jpg", "near_duplicate_bits", 2)]


def test_flat_pictures_are_no_copies_of_each_other() -> None:
    records = [make_record(n, perceptual_hash="8" + "0" * 63, sharpness=0.0) for n in range(3)]
    assert filter_records(records, QualitySettings(min_sharpness=None)).kept == records


def test_limits_the_wrong_way_round_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"quality.min_aspect 3.0 is above quality.max_aspect 2.0"):
        QualitySettings(min_aspect=3.0, max_aspect=2.0)


def test_defaults_keep_the_whole_synthetic_world(shared_world: WorldSummary) -> None:
    source = SourceSettings(name="market1501", root=Path(shared_world.root), allow_count_mismatch=True)
    records = parse_source(source).records
    assert filter_records(records, QualitySettings()).kept == records
