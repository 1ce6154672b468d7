"""Tests of engine.screening.audit and leaks: planted leaks of each kind are found, named and left out."""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from chatreid_plugin.config import BuildSettings, SourceSettings
from chatreid_plugin.demo.world import WorldSummary, write_world
from chatreid_plugin.engine.manifests import list_tested, parse_source
from chatreid_plugin.engine.screening.audit import (
    AuditReport,
    apply_leak_rule,
    audit_images,
    write_leaks,
)
from chatreid_plugin.errors import ConfigError, DataError
from chatreid_plugin.records import ImageRecord, Split
from chatreid_plugin.shards import make_manifest_table, write_manifest


PUBLISHED = "0000_000_01_0303morning_0008_0.jpg"
FLAT = "8" + "0" * 63


def make_hash(seed: int, *flipped: int) -> str:
    """Return a hash of 128 set bits, far from that of any other seed, with a few bits flipped."""
    word = (0x0123456789ABCDEF * (2 * seed + 1)) % (1 << 64)
    rest = ((1 << 64) - 1) ^ word
    value = (word << 192) | (rest << 128) | (rest << 64) | word
    return f"{value ^ sum(1 << bit for bit in flipped):064x}"


def make_record(dataset: str, path: str, person: str, split: Split = "train", **changes: Any) -> ImageRecord:
    record = ImageRecord(f"{dataset}/{path}", dataset, split, path, f"{dataset}:{person}", "1", 64, 128)
    return replace(record, **changes)


def list_leaks(report: AuditReport) -> list[tuple[str, str, str]]:
    return [(leak.kind, leak.training_image, leak.tested_image) for leak in report.leaks]


def audit_records(training: Sequence[ImageRecord], tested: Sequence[ImageRecord]) -> AuditReport:
    return audit_images(make_manifest_table(training), make_manifest_table(tested))


def apply_rule(
    sources: Sequence[Sequence[ImageRecord]], tested: Sequence[ImageRecord], recipe: BuildSettings
) -> list[list[str]]:
    """Return the image_ids of each source that stay."""
    kept = apply_leak_rule([make_manifest_table(records) for records in sources], make_manifest_table(tested), recipe)
    return [table["image_id"].to_pylist() for table in kept]


def list_ids(*sources: Sequence[ImageRecord]) -> list[list[str]]:
    return [[record.image_id for record in records] for records in sources]


def split_records(records: Sequence[ImageRecord]) -> tuple[list[ImageRecord], list[ImageRecord]]:
    training = [record for record in records if record.split == "train"]
    return training, [record for record in records if record.split in ("query", "gallery")]


def parse_folder(name: str, root: Path, **changes: Any) -> list[ImageRecord]:
    return parse_source(SourceSettings(name=name, root=root, allow_count_mismatch=True, **changes)).records


def test_identity_that_is_trained_and_tested_is_found() -> None:
    training = [make_record("a", "train/1.jpg", "1"), make_record("a", "train/2.jpg", "2")]
    tested = [make_record("a", "test/2.jpg", "2", "query"), make_record("b", "test/1.jpg", "1", "query")]
    assert list_leaks(audit_records(training, tested)) == [("identity", "a/train/2.jpg", "a/test/2.jpg")]


def test_same_image_id_is_a_path_leak() -> None:
    training = [make_record("a", "1.jpg", "1")]
    tested = [make_record("a", "1.jpg", "x", "gallery")]
    assert list_leaks(audit_records(training, tested)) == [("path", "a/1.jpg", "a/1.jpg")]


def test_published_file_name_of_another_data_set_is_a_path_leak() -> None:
    training = [make_record("icfgpedes", f"imgs/test/0000/{PUBLISHED}", "7")]
    tested = [make_record("msmt17", f"test/0000/{PUBLISHED.replace('.jpg', '.JPG')}", "0", "gallery")]
    assert list_leaks(audit_records(training, tested)) == [
        ("path", training[0].image_id, tested[0].image_id),
    ]


@pytest.mark.parametrize("name", ["0001.jpg", "person_walking_1.jpg", "12345678.jpg"])
def test_name_that_says_little_is_no_leak(name: str) -> None:
    training, tested = [make_record("a", name, "1")], [make_record("b", name, "1", "query")]
    assert audit_records(training, tested).leaks == []


def test_name_that_occurs_twice_is_no_leak() -> None:
    one, two = make_record("a", f"1/{PUBLISHED}", "1"), make_record("a", f"2/{PUBLISHED}", "2")
    other = make_record("b", PUBLISHED, "1", "query")
    assert audit_records([one, two], [other]).leaks == []
    assert audit_records([other], [one, two]).leaks == []
    assert len(audit_records([one], [other, other]).leaks) == 1


def test_same_name_of_another_image_is_no_leak() -> None:
    training = [make_record("a", PUBLISHED, "1", perceptual_hash=make_hash(1))]
    tested = [make_record("b", PUBLISHED, "1", "query", perceptual_hash=make_hash(2))]
    assert audit_records(training, tested).leaks == []
    cut = [replace(tested[0], perceptual_hash=make_hash(1, *range(40)))]
    assert [leak.kind for leak in audit_records(training, cut).leaks] == ["path"]


def test_same_name_within_a_data_set_is_no_leak() -> None:
    training = [make_record("a", f"train/{PUBLISHED}", "1")]
    tested = [make_record("a", f"test/{PUBLISHED}", "2", "query")]
    assert audit_records(training, tested).leaks == []


def test_same_bytes_are_a_content_leak() -> None:
    training = [make_record("a", "1.jpg", "1", content_hash="ab"), make_record("a", "2.jpg", "2")]
    tested = [make_record("b", "x.jpg", "9", "gallery", content_hash="ab"), make_record("b", "y.jpg", "8", "query")]
    assert list_leaks(audit_records(training, tested)) == [("content", "a/1.jpg", "b/x.jpg")]


@pytest.mark.parametrize(("flipped", "found"), [((), 1), (tuple(range(14)), 1), (tuple(range(16)), 0)])
def test_close_hash_is_a_perceptual_leak(flipped: tuple[int, ...], found: int) -> None:
    training = [make_record("a", "1.jpg", "1", perceptual_hash=make_hash(1, *flipped))]
    tested = [make_record("b", f"{n}.png", str(n), "query", perceptual_hash=make_hash(n)) for n in range(4)]
    leaks = audit_records(training, tested).leaks
    assert [(leak.kind, leak.tested_image, leak.distance) for leak in leaks] == [
        ("perceptual", "b/1.png", len(flipped))
    ] * found


def test_all_copies_of_an_image_leak_and_the_closest_tested_one_is_named() -> None:
    training = [make_record("a", f"{n}.jpg", str(n), perceptual_hash=make_hash(1)) for n in range(3)]
    tested = [
        make_record("b", "far.jpg", "1", "query", perceptual_hash=make_hash(1, 5, 6)),
        make_record("b", "near.jpg", "1", "query", perceptual_hash=make_hash(1)),
        make_record("c", "other.jpg", "1", "query", perceptual_hash=make_hash(1)),
    ]
    assert list_leaks(audit_records(training, tested)) == [
        ("perceptual", f"a/{n}.jpg", other) for n in range(3) for other in ("b/near.jpg", "c/other.jpg")
    ]


def test_image_found_by_path_or_content_is_not_reported_again() -> None:
    same = {"content_hash": "ab", "perceptual_hash": make_hash(1)}
    training = [make_record("a", PUBLISHED, "1", **same), make_record("a", "2.jpg", "2", **same)]
    tested = [make_record("b", PUBLISHED, "9", "query", **same)]
    assert [(leak.kind, leak.training_image) for leak in audit_records(training, tested).leaks] == [
        ("path", f"a/{PUBLISHED}"),
        ("content", "a/2.jpg"),
    ]


def test_flat_pictures_are_no_perceptual_leak() -> None:
    training = [make_record("a", "1.jpg", "1", perceptual_hash=FLAT, sharpness=0.0)]
    tested = [make_record("b", "2.jpg", "2", "query", perceptual_hash=FLAT, sharpness=0.0)]
    assert audit_records(training, tested).leaks == []


def test_shared_image_links_the_whole_identity() -> None:
    training = [make_record("a", f"{n}.jpg", "X" if n < 3 else "Z", content_hash=f"c{n}") for n in range(5)]
    tested = [make_record("b", "y.jpg", "Y", "gallery", content_hash="c1")]
    assert [
        (leak.kind, leak.training_image, leak.tested_person) for leak in audit_records(training, tested).leaks
    ] == [
        ("content", "a/1.jpg", "b:Y"),
        ("linked", "a/0.jpg", "b:Y"),
        ("linked", "a/2.jpg", "b:Y"),
    ]


def test_flat_picture_links_nobody() -> None:
    flat = {"content_hash": "ab", "perceptual_hash": FLAT, "sharpness": 0.0}
    training = [make_record("a", "1.jpg", "X", **flat), make_record("a", "2.jpg", "X")]
    tested = [make_record("b", "y.jpg", "Y", "gallery", **flat)]
    assert list_leaks(audit_records(training, tested)) == [("content", "a/1.jpg", "b/y.jpg")]


def test_synthetic_world_has_no_leak(shared_world: WorldSummary, tmp_path: Path) -> None:
    # Another world's crops have the same names and show other people.
    other = write_world(tmp_path / "other", train_people=11, test_people=1, cameras=3, images_per_camera=2, seed=1)
    training, tested = split_records(parse_folder("market1501", shared_world.root))
    foreign, _ = split_records(parse_folder("other", other.root, parser="market1501"))
    assert len({Path(record.path).name for record in foreign} & {Path(record.path).name for record in tested}) == 18
    report = audit_records([*training, *foreign], tested)
    assert (report.training, report.tested, report.leaks) == (48 + 66, 23, [])
    assert "nothing leaks" in report.render()


def test_files_planted_in_a_training_set_are_found(world: Path, tmp_path: Path) -> None:
    crops = tmp_path / "crops"
    (crops / "p1").mkdir(parents=True)
    (crops / "p2").mkdir()
    (crops / "p3").mkdir()
    gallery = sorted((world / "query").iterdir())
    (crops / "p1" / "copied_a.jpg").write_bytes(gallery[0].read_bytes())
    with Image.open(gallery[1]) as image:
        image.resize((image.width * 3 // 2, image.height * 3 // 2)).save(crops / "p2" / "scaled_a.jpg", quality=60)
    with Image.open(gallery[2]) as image:
        image.rotate(180).save(crops / "p3" / "turned_a.jpg")
    training = parse_folder("own", crops, parser="pattern", pattern="{person}/{index}_{camera}.jpg", train_share=1)
    _, tested = split_records(parse_folder("market1501", world))
    assert list_leaks(audit_records(training, tested)) == [
        ("content", "own/p1/copied_a.jpg", f"market1501/query/{gallery[0].name}"),
        ("perceptual", "own/p2/scaled_a.jpg", f"market1501/query/{gallery[1].name}"),
    ]


def make_leaking_sources() -> tuple[list[list[ImageRecord]], list[ImageRecord]]:
    """Return two sources of which a/1 and a/2 (identity X) leak into b/y, and the tested images."""
    first = [make_record("a", f"{n}.jpg", "X" if n < 3 else "Z", content_hash=f"c{n}") for n in range(1, 5)]
    second = [make_record("d", f"{n}.jpg", str(n), content_hash=f"d{n}") for n in range(2)]
    return [first, second], [make_record("b", "y.jpg", "Y", "gallery", content_hash="c1")]


def test_refuse_names_the_pairs_and_the_remedies(make_recipe: Callable[..., BuildSettings]) -> None:
    sources, tested = make_leaking_sources()
    message = r"^2 training images .* a/1.jpg = b/y.jpg; a/2.jpg: a:X is b:Y of b/y.jpg.*leaks: drop .*leaks: allow"
    with pytest.raises(DataError, match=message):
        apply_rule(sources, tested, make_recipe())


def test_drop_leaves_out_exactly_what_leaks(make_recipe: Callable[..., BuildSettings]) -> None:
    sources, tested = make_leaking_sources()
    kept = [sources[0][2:], sources[1]]
    assert apply_rule(sources, tested, make_recipe(leaks="drop")) == list_ids(*kept)
    assert apply_rule(kept, tested, make_recipe()) == list_ids(*kept)


def test_drop_refuses_to_leave_a_source_empty(make_recipe: Callable[..., BuildSettings]) -> None:
    sources, tested = make_leaking_sources()
    with pytest.raises(DataError, match="All 2 training images of a leak into the test"):
        apply_rule([sources[0][:2], sources[1]], tested, make_recipe(leaks="drop"))


def test_allow_warns(make_recipe: Callable[..., BuildSettings], capsys: pytest.CaptureFixture[str]) -> None:
    sources, tested = make_leaking_sources()
    assert apply_rule(sources, tested, make_recipe(leaks="allow")) == list_ids(*sources)
    assert capsys.readouterr().err == "warning: 2 training images leak into the test (leaks: allow)\n"


def test_bits_come_from_the_settings(make_recipe: Callable[..., BuildSettings]) -> None:
    training = [[make_record("a", f"{n}.jpg", str(n), perceptual_hash=make_hash(n, 1, 2)) for n in range(2)]]
    tested = [make_record("b", "y.jpg", "Y", "gallery", perceptual_hash=make_hash(1))]
    assert apply_rule(training, tested, make_recipe(audit_bits=1)) == list_ids(*training)
    assert apply_rule(training, tested, make_recipe(audit_bits=2, leaks="drop")) == list_ids(training[0][:1])


def test_report_counts_names_and_cuts(tmp_path: Path) -> None:
    training = [make_record("a", f"{n}.jpg", str(n), content_hash=f"c{n}") for n in range(30)]
    tested = [make_record("b", f"{n}.png", str(n), "gallery", content_hash=f"c{n}") for n in range(25)]
    report = audit_records(training, tested)
    text = report.render()
    assert "30 training images against 25 query and gallery images: 25 training images leak." in text
    assert "a -> b: 25 (content)" in text
    assert "a/19.jpg = b/19.png" in text and "a/20.jpg" not in text and "... and 5 more" in text
    values = json.loads(report.to_json())
    assert values["kinds"] == {"content": {"images": 25, "identities": 25}}
    assert values["pairs"] == [{"training": "a", "tested": "b", "kind": "content", "leaks": 25}]
    assert len(values["first"]) == 20
    assert values["drop"] == [f"a/{n}.jpg" for n in range(25)]
    assert report.exit_code == 3
    assert audit_records(training, []).exit_code == 0
    assert "nothing is tested" in audit_records(training, []).render()


def test_all_leaks_are_written_as_a_table(tmp_path: Path) -> None:
    sources, tested = make_leaking_sources()
    leaks = audit_records(sources[0], tested).leaks
    write_leaks(tmp_path / "leaks.csv", leaks)
    write_leaks(tmp_path / "leaks.jsonl", leaks)
    with (tmp_path / "leaks.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (tmp_path / "leaks.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["training_image"]) for row in table] == [("content", "a/1.jpg"), ("linked", "a/2.jpg")]
    assert [(row["kind"], row["training_image"]) for row in lines] == [("content", "a/1.jpg"), ("linked", "a/2.jpg")]
    with pytest.raises(ConfigError, match=r"must end in .csv or .jsonl"):
        write_leaks(tmp_path / "leaks.txt", leaks)


def test_tested_manifests_give_query_and_gallery_images(
    make_recipe: Callable[..., BuildSettings], tmp_path: Path
) -> None:
    records = [make_record("b", f"{split}.jpg", split, split) for split in ("train", "val", "query", "gallery")]
    write_manifest(tmp_path / "b.parquet", records, tmp_path, {})
    found = list_tested([], make_recipe(audit_against=[tmp_path / "b.parquet"]))
    assert found["image_id"].to_pylist() == ["b/query.jpg", "b/gallery.jpg"]
    write_manifest(tmp_path / "c.parquet", records[:2], tmp_path, {})
    with pytest.raises(DataError, match=r"c.parquet of audit_against holds no query or gallery images"):
        list_tested([], make_recipe(audit_against=[tmp_path / "c.parquet"]))
