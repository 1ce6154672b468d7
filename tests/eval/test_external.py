"""Tests of chatreid_plugin.eval.backends.files: other models' scores and features, under any protocol."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatreid_plugin.archives import normalise
from chatreid_plugin.datasets.benchmark import Benchmark
from chatreid_plugin.errors import DataError
from chatreid_plugin.eval.filter import list_image_names, list_query_names
from chatreid_plugin.eval.loader import load_benchmark
from chatreid_plugin.eval.run import run_evaluation
from chatreid_plugin.eval.settings import EvalSettings
from chatreid_plugin.shards import read_manifest, read_manifest_provenance, write_manifest


MakeWorld = Callable[..., Path]
MakeSettings = Callable[..., EvalSettings]


def write_scores(path: Path, protocol: Benchmark, *, mapped: bool = False) -> None:
    """Write perfect scores, the gallery shuffled and one image more than asked for."""
    gallery = [list_image_names(record)[0] for record in protocol.gallery] + ["extra.png"]
    persons = [record.person_id for record in protocol.gallery] + ["nobody"]
    scores = np.array([[query.person_id == person for person in persons] for query in protocol.queries], np.float32)
    order = np.random.default_rng(0).permutation(len(gallery))
    queries = [list_query_names(query)[0] for query in protocol.queries]
    names = {"queries": np.array(queries), "gallery": np.array(gallery)[order]}
    if mapped:
        np.save(path.with_suffix(".npy"), scores[:, order])
        np.savez(path, **names)
    else:
        np.savez(path, scores=scores[:, order], **names)


@pytest.mark.parametrize("mapped", [False, True])
def test_scores_are_found_by_name(
    make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path, mapped: bool
) -> None:
    manifest = make_world()
    write_scores(tmp_path / "s.npz", load_benchmark(make_settings(manifest).data), mapped=mapped)
    file = tmp_path / ("s.npy" if mapped else "s.npz")
    results = run_evaluation(make_settings(manifest, backend="scores", scores=file, filter="colour"))
    ranking = results.ranking
    assert results.settings.filter.source == "none"
    assert ranking.mean_ap == ranking.cmc[1] == results.ceiling.mean_ap == results.strict.mean_ap == 1.0
    assert results.pairs == 4 * 12
    assert (tmp_path / "out" / "report.html").is_file()


def test_captions_are_called_by_path_and_number(
    make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path
) -> None:
    manifest = make_world()
    records, root = read_manifest(manifest)
    described = [replace(record, captions=("a man", "", "in red")) for record in records]
    write_manifest(manifest, described, root, read_manifest_provenance(manifest) | {"image_root": "../images"})
    protocol = load_benchmark(make_settings(manifest, protocol="cuhkpedes").data)
    assert list_query_names(protocol.queries[1])[0].endswith(".png#2")
    write_scores(tmp_path / "s.npz", protocol)
    settings = make_settings(manifest, protocol="cuhkpedes", backend="scores", scores=tmp_path / "s.npz")
    assert run_evaluation(settings).ranking.mean_ap == 1.0


def test_features_rank_without_image_files(
    make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = make_world(images=False)
    records, _ = read_manifest(manifest)
    people = sorted({record.person_id for record in records})
    features = 3.0 * np.eye(len(people))[[people.index(record.person_id) for record in records]]
    sides = {"query": [], "gallery": []}
    for record, feature in zip(records, features, strict=True):
        sides[record.split].append((record.path, feature))
    arrays = {f"{side}_paths": np.array([path for path, _ in items]) for side, items in sides.items()}
    arrays |= {f"{side}_features": np.stack([feature for _, feature in items]) for side, items in sides.items()}
    for number, content in enumerate((arrays, {"paths": [r.path for r in records], "features": features})):
        np.savez(tmp_path / f"{number}.npz", **content)
        settings = make_settings(manifest, backend="features", features=tmp_path / f"{number}.npz")
        assert run_evaluation(settings).ranking.mean_ap == 1.0
    assert "No image is looked at: only the pictures of the report will be missing" in caplog.text


def test_names_what_a_file_lacks(make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path) -> None:
    manifest = make_world()
    file = tmp_path / "s.npz"
    settings = make_settings(manifest, backend="scores", scores=file)
    with pytest.raises(DataError, match=r"s\.npz does not exist\.$"):
        run_evaluation(settings)
    np.savez(file, scores=np.zeros((1, 2)))
    with pytest.raises(DataError, match="lacks the array"):
        run_evaluation(settings)
    np.savez(file, scores=np.zeros((1, 2)), queries=["a", "b"], gallery=["c", "d"])
    with pytest.raises(DataError, match=r"scores have shape \(1, 2\); expected \(2, 2\), as queries and gallery\."):
        run_evaluation(settings)
    np.savez(file, scores=np.zeros((2, 2)), queries=["a", "b"], gallery=["c", "d"])
    with pytest.raises(
        DataError, match=r"scores of 4 of 4 queries:(\n.*)+The file says 'a', .*\nand of 12 of 12 gallery"
    ):
        run_evaluation(settings)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "no readable .npz file: empty, cut short or of another kind; save one with numpy.savez"),
        (b"image,score\n", "no readable .npz file: empty"),
        (b"PK\x03\x04 cut short", "no readable .npz file .*cut short or of another kind"),
        (np.zeros(3), "no .npz file but a single array"),
        ({"queries": np.array(["a", None], dtype=object)}, "`queries` holds Python objects. Save names as np.array"),
        ({"queries": np.array([["a"]])}, r"names must be \(N,\), one for each row, not \(1, 1\)"),
        (
            {"scores": np.zeros((1, 1), dtype=np.complex64)},
            r"scores are of type complex64; save real numbers, such as scores\.astype\('float32'\)\.$",
        ),
    ],
)
def test_says_what_is_wrong_with_a_file_without_advising_pickles(
    content: Any, fault: str, make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path
) -> None:
    file = tmp_path / "s.npz"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif isinstance(content, dict):
        np.savez(file, **({"scores": np.zeros((1, 1)), "queries": ["a"], "gallery": ["b"]} | content))
    else:
        with file.open("wb") as stream:
            np.save(stream, content)
    with pytest.raises(DataError, match=fault) as caught:
        run_evaluation(make_settings(make_world(), backend="scores", scores=file))
    assert "pickle" not in str(caught.value)


def test_names_of_a_mapped_matrix_that_is_missing_or_broken(
    make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path
) -> None:
    np.savez(tmp_path / "s.npz", queries=["a"], gallery=["b"])
    settings = make_settings(make_world(), backend="scores", scores=tmp_path / "s.npy")
    with pytest.raises(DataError, match=r"s\.npy does not exist"):
        run_evaluation(settings)
    np.save(tmp_path / "s.npy", np.array([None]))
    with pytest.raises(DataError, match=r"s\.npy is no readable \.npy file of numbers") as caught:
        run_evaluation(settings)
    assert "pickle" not in str(caught.value)


def write_features(path: Path, paths: list[Any], features: Any) -> Path:
    np.savez(path, paths=np.array(paths), features=np.array(features))
    return path


def test_refuses_a_name_that_stands_twice_when_its_values_differ(
    make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path
) -> None:
    manifest = make_world()
    paths = [record.path for record in read_manifest(manifest)[0]]
    values = np.random.default_rng(0).normal(size=(len(paths), 3))
    file = tmp_path / "f.npz"
    settings = make_settings(manifest, backend="features", features=file)
    write_features(file, [*paths, paths[5], "extra", "extra"], [*values, values[5], [1, 1, 1], [2, 2, 2]])
    run_evaluation(settings)
    write_features(file, [*paths, paths[5]], [*values, values[6]])
    with pytest.raises(DataError, match=rf"1 name\(s\) twice or more with different values(.*\n)+  {paths[5]}\n"):
        run_evaluation(settings)
    queries, gallery = paths[:4], paths[4:]
    scores = np.random.default_rng(0).normal(size=(4, 12))
    settings = make_settings(manifest, backend="scores", scores=file)
    np.savez(file, scores=scores[:, [*range(12), 2]], queries=queries, gallery=[*gallery, gallery[3]])
    with pytest.raises(DataError, match=rf"  {gallery[3]}\n"):
        run_evaluation(settings)
    np.savez(file, scores=scores[[0, 1, 2, 3, 0]], queries=[*queries, queries[1]], gallery=gallery)
    with pytest.raises(DataError, match=rf"  {queries[1]}\n"):
        run_evaluation(settings)


@pytest.mark.parametrize("change", ["/data/{}", "C:\\data\\{}", "base"])
def test_shows_one_of_the_files_names_when_they_are_of_another_kind(
    change: str, make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path
) -> None:
    manifest = make_world()
    paths = [record.path for record in read_manifest(manifest)[0]]
    names = [Path(path).name if change == "base" else change.format(path.replace("/", change[-3])) for path in paths]
    file = write_features(tmp_path / "f.npz", names[::-1], np.ones((len(paths), 3)))
    with pytest.raises(DataError) as caught:
        run_evaluation(make_settings(manifest, backend="features", features=file))
    assert f"The file says {names[0]!r}, where {paths[0]!r} was looked for." in str(caught.value)
    assert "4 of 4 queries" in str(caught.value) and "12 of 12 gallery images" in str(caught.value)


def test_finds_names_saved_as_bytes(make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path) -> None:
    manifest = make_world()
    paths = [record.path for record in read_manifest(manifest)[0]]
    file = write_features(tmp_path / "f.npz", [path.encode() for path in paths], np.ones((len(paths), 3)))
    assert run_evaluation(make_settings(manifest, backend="features", features=file)).ranking.tie_rate == 1.0


@pytest.mark.parametrize("protocol", ["folder", "cuhkpedes"])
def test_finds_paths_when_ids_are_none(
    protocol: str, make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path
) -> None:
    manifest = make_world()
    records, root = read_manifest(manifest)
    renamed = [replace(record, image_id=f"id{n}", captions=("a man",)) for n, record in enumerate(records)]
    write_manifest(manifest, renamed, root, read_manifest_provenance(manifest) | {"image_root": "../images"})
    names = [record.path for record in records]
    if protocol == "cuhkpedes":
        names += [f"{name}#0" for name in names]
    file = write_features(tmp_path / "f.npz", names, np.ones((len(names), 3)))
    settings = make_settings(manifest, protocol=protocol, backend="features", features=file)
    assert run_evaluation(settings).ranking.tie_rate == 1.0


def test_names_query_image_and_file_when_a_score_is_not_a_number(
    make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path
) -> None:
    manifest = make_world()
    paths = [record.path for record in read_manifest(manifest)[0]]
    scores = np.zeros((4, 12))
    scores[1, 7] = np.nan
    np.savez(tmp_path / "s.npz", scores=scores, queries=paths[:4], gallery=paths[4:])
    with pytest.raises(
        DataError, match=rf"s\.npz: 1 score\(s\) of query {paths[1]} are NaN.* first that of {paths[11]};"
    ):
        run_evaluation(make_settings(manifest, backend="scores", scores=tmp_path / "s.npz"))


@pytest.mark.parametrize(("value", "fault"), [(np.inf, "NaN or infinite"), (0.0, "all zero")])
def test_refuses_features_without_a_direction(
    value: float, fault: str, make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path
) -> None:
    manifest = make_world()
    paths = [record.path for record in read_manifest(manifest)[0]]
    features = np.ones((len(paths), 3))
    features[6] = value
    write_features(tmp_path / "f.npz", paths, features)
    with pytest.raises(DataError, match=rf"f\.npz: .* of 1 of 12 image\(s\) are {fault}, first of {paths[6]};"):
        run_evaluation(make_settings(manifest, backend="features", features=tmp_path / "f.npz"))


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e200, 1e-200])
def test_the_length_of_features_changes_nothing(scale: float) -> None:
    values = np.random.default_rng(0).normal(size=(5, 3))
    values = values if not 1e-30 <= scale <= 1e30 else values.astype(np.float32)
    assert normalise(values * values.dtype.type(scale)) == pytest.approx(normalise(values), abs=1e-6)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda f: f.T, r"have shape \(3, 16\); expected \(16, D\), .* It is transposed: give features\.T\.$"),
        (lambda f: f[..., None, None], r"\(16, 3, 1, 1\);.*sides of length 1 too many: give features\.squeeze\(\)\.$"),
        (lambda f: np.ones((16, 3, 8, 4)), r"\(16, 3, 8, 4\);.*give its mean .* features\.mean\(axis=\(2, 3\)\)\.$"),
        (lambda f: f[:9], r"\(9, 3\); expected \(16, D\), as paths\. Save a row for each name in paths\.$"),
        (lambda f: f.astype(complex), r"complex128; save real numbers, such as features\.astype\('float32'\)\.$"),
    ],
)
def test_names_shape_and_remedy_of_features(
    change: Callable[[Any], Any], fault: str, make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path
) -> None:
    manifest = make_world(images=False)
    paths = [record.path for record in read_manifest(manifest)[0]]
    file = write_features(tmp_path / "f.npz", paths, change(np.ones((16, 3), dtype=np.float32)))
    with pytest.raises(DataError, match=fault):
        run_evaluation(make_settings(manifest, backend="features", features=file))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda s: s.T, r"scores have shape \(12, 4\); expected \(4, 12\), .* It is transposed: give scores\.T\.$"),
        (lambda s: s[..., None], r"scores have shape \(4, 12, 1\);.* give scores\.squeeze\(\)\.$"),
        (lambda s: s * 1e200, r"reach 4\.7e\+201, more than float32 holds \(3\.4e\+38\)\. Save them divided"),
    ],
)
def test_names_shape_and_remedy_of_scores(
    change: Callable[[Any], Any], fault: str, make_world: MakeWorld, make_settings: MakeSettings, tmp_path: Path
) -> None:
    manifest = make_world(images=False)
    paths = [record.path for record in read_manifest(manifest)[0]]
    scores = change(np.full((4, 12), 47.0))
    np.savez(tmp_path / "s.npz", scores=scores, queries=paths[:4], gallery=paths[4:])
    with pytest.raises(DataError, match=fault):
        run_evaluation(make_settings(manifest, backend="scores", scores=tmp_path / "s.npz"))


def test_refuses_a_file_without_its_backend(make_world: MakeWorld, make_settings: MakeSettings) -> None:
    with pytest.raises(ValueError, match="scores is for backend: scores"):
        make_settings(make_world(), scores="s.npz")
    with pytest.raises(ValueError, match="scoring.backend: scores needs scoring.scores"):
        make_settings(make_world(), backend="scores")
    with pytest.raises(ValueError, match="are not filtered"):
        make_settings(make_world(), backend="scores", scores="s.npz", filter="colour", fusion="linear")


@pytest.mark.parametrize(
    ("layout", "protocol"), [("cuhk03:detected_classic", "cuhk03_classic"), ("icfgpedes", "multimodal")]
)
def test_an_image_keeps_both_features_when_it_is_query_and_gallery(
    layout: str, protocol: str, parse_layout: Callable[[str], Path], make_settings: MakeSettings, tmp_path: Path
) -> None:
    manifest = parse_layout(layout)
    paths = [record.path for record in read_manifest(manifest)[0]]
    queries, gallery = np.random.default_rng(0).normal(size=(2, len(paths), 8))
    file = tmp_path / "f.npz"
    np.savez(file, query_paths=paths, query_features=queries, gallery_paths=paths, gallery_features=gallery)
    changes = {"filter": "npz", "filter_features": file, "top_k": None, "report_queries": 0}
    results = run_evaluation(make_settings(manifest, protocol=protocol, backend="features", **changes))
    assert results.baseline is not None
    assert results.ranking.mean_ap == pytest.approx(results.baseline.mean_ap, abs=1e-9)
