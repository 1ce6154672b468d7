"""What a shipped YAML offers in its comments can be used: keys to uncomment, and the values they may have."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import yaml

from chatreid_plugin.config import load_settings
from chatreid_plugin.datasets.registry import list_benchmarks
from chatreid_plugin.errors import ConfigError
from chatreid_plugin.eval.candidates import make_plan
from chatreid_plugin.eval.external import list_query_names
from chatreid_plugin.eval.features import extract_features
from chatreid_plugin.eval.loader import load_benchmark
from chatreid_plugin.eval.pipeline import run_evaluation
from chatreid_plugin.eval_settings import EvalSettings


MakeCase = Callable[..., EvalSettings]

YAMLS = sorted((Path(__file__).parents[2] / "eval").glob("*.yaml"))
LINE = re.compile(r"^(?:# )?([a-z_0-9]+): .*$", re.MULTILINE)
# Their other values need files of another program, or a server.
OPEN = ("backend",)


def find_lines(path: Path) -> dict[str, str]:
    """Return key -> its line, commented or not."""
    lines = {found.group(1): found.group() for found in LINE.finditer(path.read_text())}
    return {key: line for key, line in lines.items() if key in EvalSettings.model_fields}


def read_value(line: str) -> Any:
    return next(iter(yaml.safe_load(line.removeprefix("# ")).values()))


def list_offers(lines: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """Yield each key with each value that the file offers for it."""
    for key, line in lines.items():
        choices = re.search(r"choices: (\[.*?\])", line)
        values = yaml.safe_load(choices.group(1)) if choices and key not in OPEN else []
        assert not values or read_value(line) in values
        yield from ((key, value) for value in [read_value(line), *values])


def list_filters(lines: dict[str, str], key: str, value: Any) -> list[str | None]:
    """Return the filters that the key's comment says it goes with; None is the file's own."""
    if key == "filter":
        return [value]
    comment = lines[key].partition("  # ")[2]
    named = re.findall(r"for ([a-z]+):", comment)
    for words in re.findall(r"filter: ([a-z]+(?: or [a-z]+)*)", comment):
        named += words.split(" or ")
    return named or [None]


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.name)
def test_every_key_and_value_that_is_offered_is_accepted(path: Path) -> None:
    lines, tried = find_lines(path), 0
    for key, value in list_offers(lines):
        for name in list_filters(lines, key, value):
            values = {key: value}
            if name is not None:
                own = {other: line for other, line in lines.items() if f"for {name}:" in line}
                values |= {"filter": name} | {other: read_value(line) for other, line in own.items()}
            settings = load_settings(path, [f"{one}={yaml.safe_dump(v)}" for one, v in values.items()], EvalSettings)
            # The one key of them that results.json leaves out.
            dumped = settings.model_dump(mode="json") | {"overwrite": settings.overwrite}
            assert dumped[key] == value
            tried += 1
    commented = [line for line in lines.values() if line.startswith("# ")]
    assert tried > len(lines) > len(commented) >= 3


def test_protocol_takes_what_is_offered_for_it(case: Any, layouts_root: Path, tmp_path: Path) -> None:
    lines = find_lines(Path(__file__).parents[2] / "eval" / f"{case.recipe}.yaml")
    keys = ("max_queries", "setting", "shots", "trials_from", "camera_rule")
    for key, value in list_offers({key: line for key, line in lines.items() if key in keys}):
        settings = replace(case, changes={}).load(layouts_root, output_dir=tmp_path, **{key: value})
        manifest = Path(str(settings.manifest).replace("{trial}", "1"))
        assert load_benchmark(settings.model_copy(update={"manifest": manifest})).queries


@pytest.mark.parametrize(
    "case",
    [
        f"{name}-{'peta' if name == 'attributes' else name}"
        for name, rules in list_benchmarks().items()
        if rules.asks_in_words
    ],
    indirect=True,
)
def test_filters_that_are_offered_for_words_compare_words(case: Any, make_case: MakeCase, tmp_path: Path) -> None:
    lines = find_lines(YAMLS[0].with_name(f"{case.recipe}.yaml"))
    offered = {value for key, value in list_offers(lines) if key == "filter"}
    protocol, rng = load_benchmark(make_case()), np.random.default_rng(0)
    names = [list_query_names(query)[0] for query in protocol.queries] + [record.path for record in protocol.gallery]
    np.savez(tmp_path / "f.npz", paths=names, features=rng.normal(size=(len(names), 8)))
    files = {"filter_features": tmp_path / "f.npz", "filter_model": "absent", "filter_weights": "absent.pth"}
    plan = make_plan(make_case(filter="npz", **files))
    assert plan.query_features is not None and len(plan.query_features) == len(protocol.queries)
    taken = {"none", "npz"}
    for name in set(get_args(EvalSettings.model_fields["filter"].annotation)) - taken:
        settings = make_case(filter=name, backend="transformers", model_name_or_path="absent", **files)
        with pytest.raises(ConfigError) as caught:
            extract_features(["a red coat"], tmp_path, settings)
        taken |= set() if "compares images" in str(caught.value) else {name}
    assert offered == taken
    fused = run_evaluation(make_case(filter="npz", fusion=read_value(lines["fusion"]), **files))
    assert fused.baseline is not None and fused.baseline.mean_ap < fused.ranking.mean_ap
