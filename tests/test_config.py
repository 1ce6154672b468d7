"""Tests of chatreid_plugin.config: every fault is found, all are shown at once, overrides reach nested keys."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from chatreid_plugin.config import (
    COLOUR,
    BuildSettings,
    CaptioningSettings,
    GallerySettings,
    HardNegatives,
    SourceSettings,
    check_settings,
    list_sections,
    load_settings,
)
from chatreid_plugin.errors import ConfigError
from chatreid_plugin.eval.settings import EvalSettings
from chatreid_plugin.images import ImagePolicy
from chatreid_plugin.tasks import list_stage_tasks
from tests.support import make_eval_settings


SOURCES = "sources:\n- {name: market1501, parser: market1501, root: raw}\n"
BUILD = SOURCES + "records: {stage1: 10}\n"
SOURCE: dict[str, Any] = {"name": "own", "parser": "market1501", "root": "raw"}
EVAL: dict[str, Any] = {"protocol": "folder", "manifest": "m.parquet", "output_dir": "out", "backend": "oracle"}
EVAL["filter"] = "none"  # the default needs a model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "build.yaml"
    path.write_text(BUILD)
    return path


def build(**changes: Any) -> BuildSettings:
    return BuildSettings.model_validate({"sources": [SOURCE], "records": {"stage1": 1}} | changes)


def test_file_is_read_with_defaults(path: Path) -> None:
    settings = load_settings(path, [], BuildSettings)
    assert settings.sources[0].root == Path("raw")
    assert settings.records == {"stage1": 10}
    assert (settings.seed, settings.output_dir, settings.gallery.max_size) == (0, Path("dataset_info"), 10)


def test_default_ratios_are_the_papers() -> None:
    ratios = build().stage2_ratios
    assert list(ratios) == [task.name for task in list_stage_tasks(2)]
    image_to_image = [share for name, share in ratios.items() if name.startswith("image_to_image")]
    assert image_to_image == [0.25, 0.25]
    assert [share for name, share in ratios.items() if not name.startswith("image_to_image")] == [0.1] * 5
    assert sum(ratios.values()) == pytest.approx(1.0)


def test_default_ratios_of_stage_3_are_equal() -> None:
    ratios = build().stage3_ratios
    assert set(ratios) == {task.name for task in list_stage_tasks(3)}
    assert sum(ratios.values()) == pytest.approx(1)
    assert sum(ratio for name, ratio in ratios.items() if name.endswith("one_to_one")) == pytest.approx(0.2)


def test_sources_train_all_stages_alike_by_default() -> None:
    (source,) = build().sources
    assert (source.stages, source.weight) == ((1, 2, 3), 1.0)


def test_work_is_done_by_all_cores_of_this_machine_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 5, 7})
    assert build().executor == "local"
    assert build().count_workers() == 3
    assert build(workers=8).count_workers() == 8


def test_overrides_replace_plain_nested_and_listed_keys(path: Path) -> None:
    overrides = ["seed=7", "gallery.max_size=5", "gallery.matches=uniform", "records.stage2=3", "sources.0.root=x=y"]
    settings = load_settings(path, overrides, BuildSettings)
    assert settings.seed == 7
    assert settings.gallery == GallerySettings(max_size=5, matches="uniform")
    assert settings.records == {"stage1": 10, "stage2": 3}
    assert settings.sources[0].root == Path("x=y")


@pytest.mark.parametrize("wrong", ["seed", "--seed", "=7"])
def test_override_that_is_not_key_and_value_is_refused(path: Path, wrong: str) -> None:
    with pytest.raises(ConfigError, match=f"Overrides are written key=value; found {wrong}"):
        load_settings(path, ["seed=1", wrong], BuildSettings)


def test_all_faults_are_listed_at_once(path: Path) -> None:
    path.write_text(BUILD + "gallery: {min_size: 1, colour: red}\nseeds: 3\ncutoff_len: many\n")
    with pytest.raises(ConfigError) as error:
        load_settings(path, ["records.stage4=1", "sources.0.root=null"], BuildSettings)
    text = str(error.value)
    assert f"{path} has 6 fault(s):" in text
    for fault in (
        "gallery.min_size: Input should be greater than or equal to 2",
        "gallery.colour: unknown key",
        "seeds: unknown key; did you mean seed?",
        "cutoff_len: Input should be a valid integer",
        "records.stage4",
        "sources.0.root",
    ):
        assert f"\n  {fault}" in text
    assert "Known keys: sources, manifest_dir, output_dir, records," in text


def test_missing_key_and_wrong_address_say_what_is_expected(path: Path) -> None:
    path.write_text("data: {benchmark: folder}\noutput: {output_dir: out}\nscoring: {backend: http}\n")
    with pytest.raises(ConfigError, match=r"'127\.0\.0\.1:8/v1' is no address such as http://") as error:
        load_settings(path, ["server.base_url=127.0.0.1:8/v1"], EvalSettings)
    assert "\n  data.manifest: this key is missing" in str(error.value)


def test_fault_of_several_keys_has_no_key_before_it(path: Path) -> None:
    path.write_text("data: {benchmark: folder, manifest: m}\noutput: {output_dir: out}\nscoring: {backend: scores}\n")
    with pytest.raises(ConfigError, match=r"\n  scoring.backend: scores needs scoring.scores"):
        load_settings(path, [], EvalSettings)


def test_recipe_without_records_can_be_parsed() -> None:
    assert build(records={}).records == {}


def test_faults_of_one_check_are_listed_together(path: Path) -> None:
    path.write_text(SOURCES + SOURCES.splitlines()[1] + "\nrecords: {stage2: 1}\nstage2_ratios: {swim: 0}\n")
    with pytest.raises(ConfigError) as error:
        load_settings(path, [], BuildSettings)
    for fault in ("sources named twice: market1501", "unknown task(s) swim; Stage 2 has image_to_", "all zero"):
        assert fault in str(error.value)
    assert "Value error" not in str(error.value)


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist"):
        load_settings(tmp_path / "none.yaml", [], BuildSettings)
    with pytest.raises(ConfigError, match="cannot be read: a folder, not a file"):
        load_settings(tmp_path, [], BuildSettings)


@pytest.mark.parametrize("content", [b"a: [1", b"\xff\xfe\x00", b"output_dir: ${nope}\n", b"? [1, 2]\n: 3\n"])
def test_file_that_is_no_yaml_is_a_configuration_error(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"build\.yaml .*cannot be read as YAML"):
        load_settings(path, [], BuildSettings)


@pytest.mark.parametrize("content", ["[1, 2]", "hello", "", "1: 2\n", "null"])
def test_yaml_that_is_no_recipe_is_a_configuration_error(path: Path, content: str) -> None:
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"fault\(s\)|it must have keys"):
        load_settings(path, [], BuildSettings)


def test_settings_cannot_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        build().seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("hard", [0.5, {"share": 0.5}, {"share": 0.5, "from": "colour"}])
def test_plain_number_of_hard_negatives_is_their_share(hard: Any) -> None:
    read = build(gallery={"hard_negatives": hard}).gallery.hard_negatives
    assert read == HardNegatives(share=0.5) and read.looks == COLOUR
    assert GallerySettings().hard_negatives.share == 0.25


def test_one_file_of_features_is_for_one_source() -> None:
    gallery = {"hard_negatives": {"from": "looks.npz"}}
    captioned = SOURCE | {"name": "captioned", "stages": [1]}
    assert build(gallery=gallery, sources=[SOURCE, captioned]).gallery.hard_negatives.looks == "looks.npz"
    sources = [SOURCE, SOURCE | {"name": "second"}]
    with pytest.raises(ValidationError, match=r"one file, looks\.npz, for own, second; .*write \{source\}"):
        build(gallery=gallery, sources=sources)
    build(gallery={"hard_negatives": {"from": "{source}.npz"}}, sources=sources)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": []}, "sources is empty"),
        ({"sources": [SOURCE, SOURCE]}, "sources named twice: own"),
        ({"records": {"stage1": 0}}, "greater than or equal to 1"),
        ({"records": {"stage4": 1}}, "'stage1', 'stage2' or 'stage3'"),
        ({"stage2_ratios": {"standard_reid": 1.0}}, "unknown task.* standard_reid"),
        ({"stage2_ratios": {"attribute_prediction": -0.1}}, "greater than or equal to 0"),
        ({"stage2_ratios": {"attribute_prediction": float("inf")}}, "finite"),
        ({"stage2_ratios": {"attribute_prediction": float("nan")}}, "finite|greater"),
        ({"stage2_ratios": {"attribute_prediction": 0}}, "all zero"),
        ({"stage2_ratios": {}}, "all zero"),
        ({"stage3_ratios": {"attribute_prediction": 1.0}}, "stage3_ratios names unknown task.* attribute_prediction"),
        ({"stage3_ratios": {"standard_reid": -1}}, "greater than or equal to 0"),
        ({"stage3_ratios": {"standard_reid": 0}}, "stage3_ratios are all zero"),
        ({"executor": "slurm"}, "'local' or 'ray'"),
        ({"workers": 0}, "greater than or equal to 1"),
        ({"gallery": {"min_size": 6, "max_size": 5}}, "min_size 6 is above gallery.max_size 5"),
        ({"gallery": {"min_size": 1}}, "greater than or equal to 2"),
        ({"gallery": {"max_size": 27}}, "less than or equal to 26"),
        ({"gallery": {"hard_negatives": 1.1}}, "less than or equal to 1"),
        ({"gallery": {"hard_negatives": {"share": 1.1}}}, "less than or equal to 1"),
        ({"gallery": {"hard_negatives": {"from": "looks.npy"}}}, "String should match pattern"),
        ({"gallery": {"hard_negatives": "colour"}}, "valid dictionary"),
        ({"gallery": {"matches": "some"}}, "'uniform_overall', 'inverse' or 'uniform'"),
        ({"prompt_variants": 0}, "greater than or equal to 1"),
        ({"cutoff_len": 63}, "greater than or equal to 64"),
        ({"records_per_shard": 0}, "greater than or equal to 1"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"unknown": 1}, "Extra inputs"),
    ],
)
def test_wrong_build_setting_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        build(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Market-1501"}, "should match pattern"),
        ({"name": ""}, "should match pattern"),
        ({"trial": 0}, "greater than or equal to 1"),
        ({"stages": [4]}, "1, 2 or 3"),
        ({"weight": 0}, "greater than 0"),
        ({"weight": float("inf")}, "finite"),
        ({"unreadable": "drop"}, "'raise' or 'skip'"),
        ({"train_share": 1.5}, "less than or equal to 1"),
        ({"train_share": -0.5}, "greater than or equal to 0"),
        ({"query_cameras": "c1"}, "valid tuple"),
    ],
)
def test_wrong_source_setting_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SourceSettings.model_validate(SOURCE | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "dukemtmc"}, "'dukemtmc' is no benchmark; known: .*market1501"),
        ({"backend": "transformers"}, "needs model.model_name_or_path"),
        ({"filter": "npz"}, "needs filter.features"),
        ({"backend": "http", "model": "m", "image_order": "both"}, "asked query_first only"),
        ({"mode": "choice", "image_order": "gallery_first"}, "mode: choice shows the query first"),
        ({"protocol": "cuhkpedes", "image_order": "both"}, "cuhkpedes asks in words"),
        ({"filter": "torchvision"}, "needs filter.weights"),
        ({"backend": "features", "filter": "none"}, "filter.source must not be none"),
        ({"chatreid_stage": 4}, "1, 2 or 3"),
        ({"chatreid_aspect": "crop"}, "'stretch' or 'keep'"),
        ({"image_max_pixels": 783}, "greater than or equal to 784"),
        ({"image_min_pixels": 0}, "greater than or equal to 1"),
        ({"max_queries": 0}, "greater than or equal to 1"),
        ({"top_k": 0}, "greater than or equal to 1"),
        ({"floor": -1}, "greater than or equal to 0"),
        ({"batch_size": 0}, "greater than or equal to 1"),
        ({"report_queries": -1}, "greater than or equal to 0"),
        ({"mode": "listwise"}, "'pointwise'"),
        ({"dtype": "int8"}, "'float32'"),
        ({"model.model_nam": "x"}, "Extra inputs"),
    ],
)
def test_wrong_evaluation_setting_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make_eval_settings(EVAL | changes)


def test_missing_partners_of_an_evaluation_are_listed_together() -> None:
    with pytest.raises(ValidationError, match=r"needs model.model_name_or_path.*; scoring.fusion: linear fuses"):
        make_eval_settings(EVAL | {"backend": "transformers", "fusion": "linear"})


def test_evaluation_has_the_policy_of_its_settings() -> None:
    changes = {"chatreid_stage": 2, "chatreid_aspect": "keep", "image_max_pixels": 1000, "image_min_pixels": 10}
    assert make_eval_settings(EVAL | changes).model.policy == ImagePolicy(2, "keep", 1000, 10)
    assert make_eval_settings(EVAL | {"chatreid_stage": None}).model.policy == ImagePolicy(None)


@pytest.mark.parametrize(
    "value",
    [
        "${oc.${seed_name}:HOME}",
        "a ${oc.${seed_name}:HOME,{}} b",
        "${oc.${oc.select:seed_name,{}}:HOME}",
        "${${first}.${seed_name}:HOME}",
        "${oc.${seed_name}:HOME,'{'}",
    ],
)
def test_name_of_a_function_is_not_put_together(value: str) -> None:
    values = {"seed_name": "env", "first": "oc", "model": value}
    with pytest.raises(ConfigError, match="model takes a value of the environment"):
        check_settings(values, [], CaptioningSettings, "test")


@pytest.mark.parametrize("value", ["${detail}", "${detail}:8000", "${extra_body.${detail}}:8000", "{a: b}:"])
def test_other_interpolations_are_taken(value: str) -> None:
    values = {"detail": "low", "extra_body": {"low": "x"}, "model": value}
    assert check_settings(values, [], CaptioningSettings, "test").model


def test_values_of_the_environment_are_refused_so_that_none_ends_in_provenance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHATREID_TEST_KEY", "sk-secret")
    recipe = tmp_path / "recipe.yaml"
    body = "{nested: [{authorization: 'Bearer ${oc.env:CHATREID_TEST_KEY}'}]}"
    recipe.write_text(
        "sources: [{name: own, parser: pattern, root: '${oc.env:CHATREID_TEST_KEY}'}]\n"
        f"captioning: {{model: x, extra_body: {body}}}\n"
    )
    for overrides, place in (
        (["sources.0.root=/data"], r"captioning\.extra_body\.nested\.0\.authorization"),
        (["captioning=null"], r"sources\.0\.root"),
    ):
        with pytest.raises(ConfigError, match=f"{place} takes a value of the environment") as error:
            load_settings(recipe, overrides, BuildSettings)
        assert "sk-secret" not in str(error.value)
    settings = load_settings(recipe, ["captioning=null", "sources.0.root=/data"], BuildSettings)
    assert settings.sources[0].root == Path("/data")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("top_k=5", "top_k: write filter.top_k"),
        ("filter=colour", "filter: write filter.source"),
        ("model=qwen", "model: write server.model"),
        ("protocol=folder", "protocol: write data.benchmark"),
        ("seed=3", "seed: write data.seed and scoring.seed"),
        ("filter.topk=5", "filter.topk: unknown key; did you mean filter.top_k?"),
        ("protocl=folder", "protocl: unknown key; did you mean data.benchmark?"),
        ("filtr.top_k=5", "filtr: unknown key; did you mean filter?"),
    ],
)
def test_a_key_without_its_section_is_refused_with_its_new_name(path: Path, override: str, message: str) -> None:
    path.write_text(
        "data: {benchmark: folder, manifest: m}\noutput: {output_dir: out}\nmodel: {model_name_or_path: m}\n"
    )
    load_settings(path, [], EvalSettings)
    with pytest.raises(ConfigError, match=re.escape(f"\n  {message}")):
        load_settings(path, [override], EvalSettings)


def test_a_file_without_sections_is_told_all_of_its_new_names(path: Path) -> None:
    path.write_text("protocol: folder\nmanifest: m\nfilter: colour\noutput_dir: out\n")
    with pytest.raises(ConfigError) as error:
        load_settings(path, ["filter.top_k=5"], EvalSettings)
    assert f"{path} has 4 key(s) without a section:" in str(error.value)
    for line in ("protocol: write data.benchmark", "manifest: write data.manifest", "filter: write filter.source"):
        assert f"\n  {line}" in str(error.value)


def test_every_old_name_that_changed_is_a_key_now() -> None:
    places = {f"{name}.{key}" for name, section in list_sections(EvalSettings).items() for key in section.model_fields}
    assert {new for names in EvalSettings.renamed.values() for new in names.split(" and ")} <= places
