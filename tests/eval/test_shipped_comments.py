"""What the annotated YAML says of its keys: all are there, with their defaults, and its choices are accepted."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import yaml

from chatreid_plugin.config import list_sections, load_settings
from chatreid_plugin.datasets.registry import list_benchmarks
from chatreid_plugin.errors import ConfigError
from chatreid_plugin.eval.candidates import make_plan
from chatreid_plugin.eval.filter import extract_features, list_query_names
from chatreid_plugin.eval.loader import load_benchmark
from chatreid_plugin.eval.run import run_evaluation
from chatreid_plugin.eval.settings import EvalSettings, FilterSettings
from tests.support import alter


MakeCase = Callable[..., EvalSettings]

YAMLS = sorted((Path(__file__).parents[2] / "eval").glob("*.yaml"))
ANNOTATED = YAMLS[0].with_name("market1501.yaml")
# Their other values need files of another program, or a server.
OPEN = ("scoring.backend",)
# Keys that only say something of another benchmark, which is not this file's.
OTHERS = ("data.variant", "data.setting", "data.shots", "data.trials_from")


def read_lines() -> dict[str, tuple[str, bool]]:
    """Return key with its section -> its line without the comment sign, and whether there was one."""
    found: dict[str, tuple[str, bool]] = {}
    section = ""
    for line in ANNOTATED.read_text().splitlines():
        if head := re.match(r"(?:# )?([a-z]+):(?:  # .*)?$", line):
            section = head.group(1)
        elif key := re.match(r"(#   |  (?:# )?)([a-z_0-9]+: .*)$", line):
            found[f"{section}.{key.group(2).partition(':')[0]}"] = key.group(2), "#" in key.group(1)
    return found


LINES = read_lines()
WORDS = [name for name, rules in list_benchmarks().items() if rules.asks_in_words]


def read_value(key: str) -> Any:
    return next(iter(yaml.safe_load(LINES[key][0]).values()))


def read_choices(key: str) -> list[Any]:
    choices = re.search(r"choices: (\[.*?\])", LINES[key][0])
    return yaml.safe_load(choices.group(1)) if choices else []


def test_every_key_is_there_with_its_default() -> None:
    sections = list_sections(EvalSettings)
    fields = {
        f"{name}.{key}": field for name, section in sections.items() for key, field in section.model_fields.items()
    }
    assert set(LINES) == set(fields)
    for key, (_, is_comment) in LINES.items():
        default = fields[key].get_default()
        if not is_comment and not fields[key].is_required() and key != "model.model_name_or_path":
            value = read_value(key)
            assert (tuple(value) if isinstance(value, list) else value) == default, key
        assert not is_comment or key.startswith("server.") or default is None, key


def list_offers() -> list[tuple[str, Any]]:
    return [(key, value) for key in LINES for value in [read_value(key), *read_choices(key)]]


@pytest.mark.parametrize("key", [key for key in LINES if key not in OPEN + OTHERS])
def test_every_value_that_is_offered_is_accepted(key: str, tmp_path: Path) -> None:
    for value in [read_value(key), *read_choices(key)]:
        given = {key: value}
        # What its comment says it goes with.
        source = (
            value
            if key == "filter.source"
            else next(iter(re.findall(r"for (?!backend)([a-z]+):", LINES[key][0])), None)
        )
        if source is not None:
            needed = [other for other, (line, _) in LINES.items() if f"for {source}:" in line]
            given |= {"filter.source": source} | {other: read_value(other) for other in needed}
        if backend := re.search(r"for backend: ([a-z]+)", LINES[key][0]):
            given |= {"scoring.backend": backend.group(1)}
        overrides = [f"{one}={yaml.safe_dump(chosen)}" for one, chosen in given.items()]
        settings = load_settings(ANNOTATED, overrides, EvalSettings)
        section, _, name = key.partition(".")
        found = getattr(getattr(settings, section), name)
        assert (str(found) if isinstance(found, Path) else list(found) if isinstance(found, tuple) else found) == value
    assert not read_choices(key) or read_value(key) in read_choices(key)


def test_benchmark_takes_each_of_its_choices(case: Any, layouts_root: Path, tmp_path: Path) -> None:
    plain = replace(case, changes={})
    benchmark = plain.load(layouts_root, output_dir=tmp_path).data.benchmark
    offers = [
        (key, value)
        for key in ("setting", "shots", "trials_from")
        for value in list_benchmarks()[benchmark].choices.get(key, ())
        if not (value == "agw_seed" and "multi" in case.recipe)
    ]
    for key, value in [*offers, ("max_queries", 2)]:
        settings = plain.load(layouts_root, output_dir=tmp_path, **{key: value})
        manifest = Path(str(settings.data.manifest).replace("{trial}", "1"))
        assert load_benchmark(alter(settings, {"manifest": manifest}).data).queries


@pytest.mark.parametrize(
    "case", [f"{name}-{'peta' if name == 'attributes' else name}" for name in WORDS], indirect=True
)
def test_filters_that_are_offered_for_words_compare_words(case: Any, make_case: MakeCase, tmp_path: Path) -> None:
    words = re.search(r"words need (.*)", LINES["filter.source"][0])
    assert words is not None
    benchmark, rng = load_benchmark(make_case().data), np.random.default_rng(0)
    names = [list_query_names(query)[0] for query in benchmark.queries] + [record.path for record in benchmark.gallery]
    np.savez(tmp_path / "f.npz", paths=names, features=rng.normal(size=(len(names), 8)))
    files = {"filter_features": tmp_path / "f.npz", "filter_model": "absent", "filter_weights": "absent.pth"}
    plan = make_plan(make_case(filter="npz", **files))
    assert plan.features is not None and len(plan.features[0]) == len(benchmark.queries)
    taken = {"none", "npz"}
    for name in set(get_args(FilterSettings.model_fields["source"].annotation)) - taken:
        settings = make_case(filter=name, backend="transformers", model_name_or_path="absent", **files)
        with pytest.raises(ConfigError) as caught:
            extract_features(["a red coat"], tmp_path, settings.filter)
        taken |= set() if "compares images" in str(caught.value) else {name}
    assert set(re.split(", | or ", words.group(1))) == taken
    fused = run_evaluation(make_case(filter="npz", fusion="linear", **files))
    assert fused.baseline is not None and fused.baseline.mean_ap < fused.ranking.mean_ap
