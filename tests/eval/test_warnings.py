"""What makes a figure another one than it seems, and is said wherever the figure stands: log, results, table, page."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatreid_plugin.config import load_settings
from chatreid_plugin.datasets.benchmark import Benchmark
from chatreid_plugin.datasets.matching import label_benchmark
from chatreid_plugin.eval.batch import describe_plan
from chatreid_plugin.eval.comparison import describe_comparison, read_run, render_text
from chatreid_plugin.eval.loader import compare_size, load_benchmark
from chatreid_plugin.eval.metrics import evaluate_ranking
from chatreid_plugin.eval.report import render_table
from chatreid_plugin.eval.run import run_evaluation
from chatreid_plugin.eval.settings import EvalSettings
from chatreid_plugin.eval.splits import list_shared_parts
from chatreid_plugin.shards import read_json, read_manifest, write_manifest
from tests.support import alter


MakeWorld = Callable[..., Path]
MakeSettings = Callable[..., EvalSettings]
EVAL = Path(__file__).parents[2] / "eval"
# Of the full test sets, as eval/README.md has them: queries (with the skipped ones) and gallery images of a trial.
SIZES = {
    "market1501": (3368, 15913),
    "msmt17_v1": (11659, 82161),
    "msmt17_v2": (11659, 82161),
    "cuhk03_detected": (1400, 5332),
    "cuhk03_labeled": (1400, 5328),
    "ltcc_standard": (493, 7050),
    "ltcc_cc": (493, 7050),
    "ltcc_sc": (493, 7050),
    "prcc_cross_clothes_multi": (3543, 3384),
    "prcc_cross_clothes_single": (3543, 71),
    "prcc_same_clothes_multi": (3873, 3384),
    "prcc_same_clothes_single": (3873, 71),
    "sysumm01_all_single": (3803, 301),
    "sysumm01_all_multi": (3803, 3010),
    "sysumm01_indoor_single": (3803, 112),
    "sysumm01_indoor_multi": (3803, 1120),
    "regdb_visible_to_infrared": (2060, 2060),
    "regdb_infrared_to_visible": (2060, 2060),
    "llcm": (7166, None),
    "cuhkpedes": (6156, 3074),
    "icfgpedes": (19848, 19848),
    "rstpreid": (2000, 1000),
}
WITHOUT_SIZE = {"attributes", "cuhk03_classic", "folder", "multimodal"}


def find_everywhere(settings: EvalSettings, text: str, *, page: str = "report.html") -> list[bool]:
    """Return whether results.json, the table, the page, `chatreid report` and its JSON say a text."""
    results = run_evaluation(settings)
    content = read_json(settings.output.output_dir / "results.json")
    run = read_run(settings.output.output_dir)
    return [
        any(text in warning for warning in content["warnings"]),
        text in render_table(results),
        text in (settings.output.output_dir / page).read_text(),
        text in render_text([run]),
        any(text in warning for warning in describe_comparison([run])["warnings"]),
    ]


def test_a_filter_that_caps_the_result_is_said_everywhere(make_world: MakeWorld, make_settings: MakeSettings) -> None:
    people = [("gallery", str(person), camera) for person in range(1, 9) for camera in "23"]  # two of each colour
    manifest = make_world([*(("query", str(person), "1") for person in range(1, 9)), *people])
    settings = make_settings(manifest, filter="colour", tau=-1, top_k=1, floor=0)
    for words in (
        "The filter caps the result: it lost",
        "Raise filter.top_k (1) or filter.recall (0.99), or choose a better filter.source (colour) or none.",
    ):
        assert all(find_everywhere(settings, words))
    whole = alter(settings, {"top_k": None})
    assert not any(find_everywhere(whole, "The filter caps the result"))


def copy_a_query(manifest: Path, *, hashed: bool, person: str = "tiny:1") -> None:
    """Give every record a hash of its own, or none, and the first query's file to the first person's camera 2."""
    records, root = read_manifest(manifest)
    records = [replace(record, content_hash=f"{n:x}" if hashed else "") for n, record in enumerate(records)]
    (place,) = [n for n, r in enumerate(records) if (r.split, r.person_id, r.camera_id) == ("gallery", "tiny:1", "2")]
    same = {"content_hash": records[0].content_hash} if hashed else {"path": records[0].path}
    records[place] = replace(records[place], person_id=person, **same)
    write_manifest(manifest, records, root, {"made_by": "test"})


@pytest.mark.parametrize("hashed", [True, False])
def test_query_that_is_in_the_gallery_is_counted_and_warned_of(
    make_world: MakeWorld, make_settings: MakeSettings, caplog: pytest.LogCaptureFixture, hashed: bool
) -> None:
    manifest = make_world()
    copy_a_query(manifest, hashed=hashed)
    settings = make_settings(manifest)
    text = "1 of 4 queries have their own file in the gallery, byte for byte, and no rule ignores it"
    assert all(find_everywhere(settings, text))
    assert text in caplog.text and text in describe_plan(settings)
    assert read_json(settings.output.output_dir / "results.json")["protocol"]["copied_queries"] == 1


def test_own_file_is_no_match_when_copies_are_ignored(make_world: MakeWorld, make_settings: MakeSettings) -> None:
    manifest = make_world()
    copy_a_query(manifest, hashed=True)
    paths = [record.path for record in read_manifest(manifest)[0]]
    # The copy is first and the person's only other match is last.
    scores = np.zeros((4, 12))
    scores[0, 1], scores[0, 2] = 1.0, -1.0
    file = manifest.with_name("s.npz")
    np.savez(file, scores=scores, queries=paths[:4], gallery=paths[4:])
    changes: dict[str, Any] = {"backend": "scores", "scores": file}
    counted = run_evaluation(make_settings(manifest, **changes))
    ignored = run_evaluation(make_settings(manifest, ignore_copies=True, **changes))
    assert counted.ranking.average_precisions[0] == pytest.approx((1 + 2 / 11) / 2)
    assert ignored.ranking.average_precisions[0] == pytest.approx(1 / 10)
    assert not ignored.warnings
    assert ignored.benchmark.copied_queries == 1
    assert ignored.benchmark.variant.endswith("ignored, the query's own file ignored")


def test_own_file_is_ignored_whoever_it_is_said_to_show(make_world: MakeWorld, make_settings: MakeSettings) -> None:
    manifest = make_world()
    copy_a_query(manifest, hashed=True, person="tiny:2")
    benchmark = load_benchmark(make_settings(manifest, ignore_copies=True).data)
    assert benchmark.copied_queries == 1
    paths = [record.path for record in read_manifest(manifest)[0]]
    scores = np.zeros((4, 12))
    scores[0, 1], scores[0, 2] = 2.0, 1.0
    np.savez(manifest.with_name("s.npz"), scores=scores, queries=paths[:4], gallery=paths[4:])
    changes: dict[str, Any] = {"backend": "scores", "scores": manifest.with_name("s.npz")}
    for ignored, first in ((False, 0.5), (True, 1.0)):
        results = run_evaluation(make_settings(manifest, ignore_copies=ignored, **changes))
        assert results.ranking.average_precisions[0] == first


def test_query_that_only_its_own_file_matches_is_skipped(make_world: MakeWorld, make_settings: MakeSettings) -> None:
    items = [("query", "1", "1"), ("gallery", "1", "2"), ("query", "2", "1"), ("gallery", "2", "2")]
    manifest = make_world(items)
    copy_a_query(manifest, hashed=True)
    benchmark = load_benchmark(make_settings(manifest, ignore_copies=True).data)
    assert [item.reason for item in benchmark.skipped] == [
        "identity tiny:1 has no other match than the query's own file"
    ]


@pytest.mark.parametrize(
    ("layout", "name"), [("cuhk03:detected_classic", "cuhk03_classic"), ("cuhkpedes", "multimodal")]
)
def test_own_image_that_a_rule_ignores_is_no_copy(
    layout: str, name: str, parse_layout: Callable[[str], Path], make_settings: MakeSettings
) -> None:
    plain = load_benchmark(make_settings(parse_layout(layout), protocol=name).data)
    same = load_benchmark(make_settings(parse_layout(layout), protocol=name, ignore_copies=True).data)
    assert plain.copied_queries == same.copied_queries == 0
    assert label_benchmark(same).copies and not label_benchmark(plain).copies
    before, after = label_benchmark(plain), label_benchmark(same)
    for query in range(len(plain.queries)):
        assert before.find_ignored(query).tolist() == after.find_ignored(query).tolist()


def test_copies_are_ignored_in_every_trial(make_world: MakeWorld, make_settings: MakeSettings) -> None:
    manifest = make_world()
    copy_a_query(manifest, hashed=True)
    labels = label_benchmark(load_benchmark(make_settings(manifest, ignore_copies=True).data))
    places = np.array([1, 2, 5])
    assert labels.take_gallery(places).find_ignored(0).tolist() == labels.find_ignored(0)[places].tolist()
    assert labels.take_gallery(places[1:]).find_ignored(0).tolist() == [False, False]
    assert labels.find_ignored(0).tolist() == [True, True] + [False] * 10


def test_one_model_over_splits_is_warned_of(
    make_world: MakeWorld,
    make_settings: MakeSettings,
    copy_splits: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    manifest = make_world()
    paths = [record.path for record in read_manifest(manifest)[0]]
    file = manifest.with_name("f.npz")
    np.savez(file, paths=paths, features=np.eye(len(paths)))
    settings = make_settings(copy_splits(manifest, (1, 2)), splits=[1, 2], backend="features", features=file)
    text = f"All 2 splits are measured with the same scoring.features: {file}. A model that was trained on one split"
    assert all(find_everywhere(settings, text, page="split2/report.html"))
    assert text in caplog.text and text in describe_plan(settings)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"backend": "transformers", "model_name_or_path": "saves/a"}, ["model.model_name_or_path: saves/a"]),
        ({"backend": "transformers", "model_name_or_path": "saves/{trial}"}, []),
        (
            {"backend": "transformers", "model_name_or_path": "Qwen/Qwen2-VL", "adapter_name_or_path": "a/{trial}"},
            [],
        ),
        (
            {"backend": "http", "model": "mine", "base_url": "http://h:1/v1"},
            ["server.model: mine, server.base_url: http://h:1/v1"],
        ),
        ({"backend": "http", "base_url": "http://h:800{trial}/v1"}, []),
        ({"backend": "scores", "scores": "s.npz"}, ["scoring.scores: s.npz"]),
        ({"backend": "features", "filter": "npz", "filter_features": "f.npz"}, ["filter.features: f.npz"]),
        ({"backend": "features", "filter": "colour"}, []),
        ({"backend": "random"}, []),
    ],
)
def test_names_what_the_splits_share(make_settings: MakeSettings, changes: dict[str, Any], named: list[str]) -> None:
    remarks = list_shared_parts(make_settings(Path("m{trial}.parquet"), splits=[1, 2, 3], **changes))
    assert len(remarks) == len(named)
    assert all(f"with the same {name}. " in remark for name, remark in zip(named, remarks, strict=True))
    assert not list_shared_parts(make_settings(Path("m{trial}.parquet"), splits=[1], **changes))


def make_distances(people: int = 20, images: int = 5) -> tuple[Any, Any, Any]:
    """Return distances that rank well when they are turned round, and the identities of both sides."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(people, 8))
    gallery = np.repeat(centres, images, axis=0) + generator.normal(size=(people * images, 8))
    distances = ((centres[:, None] - gallery[None]) ** 2).sum(axis=2)
    return distances, np.arange(people), np.repeat(np.arange(people), images)


def test_distances_instead_of_scores_are_warned_of() -> None:
    distances, queries, gallery = make_distances()
    with pytest.warns(UserWarning, match=r"reversed order .* mAP .* over 20 queries.* hand over -scores\.$") as caught:
        found = evaluate_ranking(distances, queries, gallery)
    right = evaluate_ranking(-distances, queries, gallery)
    figures = f"mAP {100 * right.mean_ap:.1f} instead of {100 * found.mean_ap:.1f} over"
    assert figures in str(caught[0].message)
    assert caught[0].filename == __file__


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("queries", [1, 2, 4, 20, 250])
def test_scores_that_say_nothing_are_not_called_distances(queries: int) -> None:
    for seed in range(3 if queries > 20 else 12):
        scores = np.random.default_rng(seed).normal(size=(queries, 30))
        evaluate_ranking(scores, np.arange(queries) % 10, np.arange(30) % 10)


def test_distances_of_a_file_are_said_wherever_the_figure_stands(
    make_world: MakeWorld, make_settings: MakeSettings, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = make_world(images=False)
    records = read_manifest(manifest)[0]
    queries, gallery = records[:4], records[4:]
    scores = [[float(one.person_id != other.person_id) for other in gallery] for one in queries]
    file = manifest.with_name("d.npz")
    np.savez(file, scores=scores, queries=[r.path for r in queries], gallery=[r.path for r in gallery])
    settings = make_settings(manifest, backend="scores", scores=file)
    text = "In reversed order these scores rank far better: mAP 100.0 instead of"
    assert all(find_everywhere(settings, text))
    assert f"if they are distances, save them negated in {file}" in caplog.text


def test_counts_of_another_test_set_are_said_wherever_the_figure_stands(
    make_world: MakeWorld, make_settings: MakeSettings
) -> None:
    settings = make_settings(make_world(), protocol="market1501", max_queries=3)
    size = "4 x 12 instead of 3,368 x 15,913"
    assert all(find_everywhere(settings, f"Not the published test set: queries x gallery images are {size}."))
    assert all(find_everywhere(settings, "Only 3 of 4 queries ask (max_queries)."))
    assert read_json(settings.output.output_dir / "results.json")["protocol"]["unlike_published"] == size
    assert f"queries x gallery images are {size}" in render_text([read_run(settings.output.output_dir)])
    assert not run_evaluation(make_settings(settings.data.manifest)).warnings


def test_published_sizes_are_those_of_the_readme() -> None:
    shipped = {path.stem for path in EVAL.glob("*.yaml")}
    # A new file is held against its own rules alone, until it stands here.
    assert shipped >= SIZES.keys() | WITHOUT_SIZE
    for name in SIZES.keys() | WITHOUT_SIZE:
        settings = load_settings(EVAL / f"{name}.yaml", [], EvalSettings)
        queries, gallery = SIZES.get(name, (5, 7))
        variant = settings.data.variant or ""
        whole: Any = Benchmark(name, "", [None] * queries, [None] * (gallery or 9), Path())  # type: ignore[list-item]
        assert compare_size(whole, settings.data, variant) == "", name
        fewer = replace(whole, queries=whole.queries[1:])
        wanted = f"{queries:,} x {gallery:,}" if gallery else f"{queries:,}"
        found = f"{queries - 1:,} x {gallery:,}" if gallery else f"{queries - 1:,}"
        assert compare_size(fewer, settings.data, variant) == (
            f"{found} instead of {wanted}" if name in SIZES else ""
        ), name
        if gallery and name in SIZES:
            less = replace(whole, gallery=whole.gallery[1:])
            assert compare_size(less, settings.data, variant).startswith(
                f"{queries:,} x {gallery - 1:,} instead of"
            ), name


def test_splits_say_what_only_some_of_them_have(
    make_world: MakeWorld, make_settings: MakeSettings, copy_splits: Callable[..., Path]
) -> None:
    manifest = make_world()
    pattern = copy_splits(manifest, (1, 2))
    copy_a_query(manifest.with_name(f"{manifest.stem}_split2.parquet"), hashed=True)
    results = run_evaluation(make_settings(pattern, splits=[1, 2]))
    assert results.benchmark.copied_queries == 1
    (caution,) = results.warnings
    assert caution.startswith("1 of 4 queries have their own file") and caution.endswith("(1 of 2 splits)")
