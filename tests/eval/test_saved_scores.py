"""Saved scores are ranked without the model that gave them: the same results, or one error that says what is wrong."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from chatreid_plugin.checkpoints import write_system_prompt
from chatreid_plugin.errors import ConfigError, DataError
from chatreid_plugin.eval.batch import describe_plan
from chatreid_plugin.eval.run import run_evaluation
from chatreid_plugin.eval.settings import EvalSettings
from chatreid_plugin.shards import read_json
from tests.support import alter


MakeWorld = Callable[..., Path]
MakeSettings = Callable[..., EvalSettings]


@pytest.fixture
def settings(make_world: MakeWorld, make_settings: MakeSettings, checkpoint: Path, tmp_path: Path) -> EvalSettings:
    """Return the settings of an evaluation of a tiny checkpoint, which may be taken away."""
    model = shutil.copytree(checkpoint, tmp_path / "model")
    changes = {"backend": "transformers", "filter": "colour", "top_k": 4, "floor": 0, "device": "cpu"}
    return make_settings(make_world(), model_name_or_path=str(model), **changes)


def change(settings: EvalSettings, **changes: Any) -> EvalSettings:
    return alter(settings, changes)


def take_model_away(settings: EvalSettings) -> None:
    Path(str(settings.model.model_name_or_path)).rename(settings.output.output_dir.parent / "elsewhere")


def list_scores(settings: EvalSettings) -> list[Path]:
    return sorted(settings.output.output_dir.rglob("scores-*.jsonl"))


def test_system_prompt_is_part_of_what_scores_depend_on(settings: EvalSettings) -> None:
    write_system_prompt(Path(str(settings.model.model_name_or_path)), "Compare people.")
    recorded = run_evaluation(settings)
    named = run_evaluation(change(settings, system_prompt="Compare people."))
    assert len(list_scores(settings)) == 1 and named.fingerprint == recorded.fingerprint
    take_model_away(settings)
    for prompt in (None, "Compare people."):
        run_evaluation(change(settings, saved_scores=True, system_prompt=prompt))
    with pytest.raises(ConfigError, match='system_prompt was "Compare people.", is "Mine."'):
        run_evaluation(change(settings, saved_scores=True, system_prompt="Mine."))


@pytest.mark.parametrize("fusion", ["linear", "k_reciprocal"])
def test_gives_the_results_of_the_model_when_it_is_gone(settings: EvalSettings, fusion: str) -> None:
    fused, names = change(settings, fusion=fusion), ("results.json", "rankings.parquet", "report.html")
    run_evaluation(fused)
    expected = {name: (settings.output.output_dir / name).read_bytes() for name in names}
    run_evaluation(settings)
    (scores,) = list_scores(settings)
    saved = scores.read_bytes()
    take_model_away(settings)
    run_evaluation(change(fused, saved_scores=True))
    assert {name: (settings.output.output_dir / name).read_bytes() for name in names} == expected
    assert scores.read_bytes() == saved
    with pytest.raises(
        ConfigError, match=f"does not exist.*saved in {settings.output.output_dir} can be.*saved_scores=true"
    ):
        run_evaluation(fused)
    scores.unlink()
    with pytest.raises(ConfigError, match="does not exist.$"):
        run_evaluation(fused)


def test_takes_the_file_of_these_settings_among_several(settings: EvalSettings) -> None:
    choice = change(settings, mode="choice", window=3)
    expected = [run_evaluation(one).ranking.mean_ap for one in (settings, choice)]
    assert len(list_scores(settings)) == 2
    take_model_away(settings)
    found = [run_evaluation(change(one, saved_scores=True)) for one in (settings, choice)]
    assert [one.ranking.mean_ap for one in found] == expected
    assert [one.confidence for one in found] == ["margins", "log_odds"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "choice"}, r'mode was "pointwise", is "choice"\n'),
        ({"image_order": "both"}, r'image_order was "query_first", is "both"'),
        ({"chatreid_stage": 2}, r"chatreid_stage was 3, is 2"),
        ({"model_name_or_path": "m"}, r'model_name_or_path was ".*", is "m"\n'),
        ({"adapter_name_or_path": "a"}, r'adapter_name_or_path was null, is "a"\n'),
    ],
)
def test_says_what_differs_when_no_file_fits(settings: EvalSettings, changes: dict[str, Any], message: str) -> None:
    run_evaluation(settings)
    with pytest.raises(ConfigError, match=rf"no file in .*\n  {list_scores(settings)[0].name}: {message}"):
        run_evaluation(change(settings, saved_scores=True, **changes))


def test_says_that_there_are_no_scores(settings: EvalSettings) -> None:
    with pytest.raises(ConfigError, match=rf"{settings.output.output_dir} has no scores-\*.jsonl"):
        run_evaluation(change(settings, saved_scores=True))


def test_names_a_file_that_has_no_header(settings: EvalSettings) -> None:
    settings.output.output_dir.mkdir()
    for name, content in (("a", b""), ("b", b"not json\n"), ("c", b'{"fingerprint": 3}\n')):
        (settings.output.output_dir / f"scores-{name}.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=r"scores-a.jsonl: its first line does not say.*\n  scores-b.*\n  scores-c"):
        run_evaluation(change(settings, saved_scores=True))


def test_refuses_to_choose_between_two_models(settings: EvalSettings) -> None:
    run_evaluation(settings)
    (scores,) = list_scores(settings)
    header, *lines = scores.read_text().splitlines(keepends=True)
    other = json.loads(header)
    other["fingerprint"]["weights"] = "0123"
    copy = scores.with_name("scores-fedcba987654.jsonl")
    copy.write_text("".join([json.dumps(other, sort_keys=True) + "\n", *lines]))
    with pytest.raises(ConfigError, match=rf'several files in (.|\n)*{copy.name}: weights "0123"'):
        run_evaluation(change(settings, saved_scores=True))


def test_says_how_many_queries_are_missing(settings: EvalSettings, tmp_path: Path) -> None:
    run_evaluation(settings)
    (scores,) = list_scores(settings)
    take_model_away(settings)
    with pytest.raises(DataError, match="lacks the scores of 4 of 4 queries.*the filter's keys"):
        run_evaluation(change(settings, saved_scores=True, top_k=5))
    whole = scores.read_bytes().splitlines(keepends=True)
    scores.write_bytes(b"".join(whole[:3]))
    with pytest.raises(DataError, match="lacks the scores of 2 of 4 queries"):
        run_evaluation(change(settings, saved_scores=True))
    assert scores.read_bytes() == b"".join(whole[:3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overwrite": True}, "overwrite removes the saved scores"),
        ({"backend": "random"}, "backend: random loads no model"),
    ],
)
def test_refuses_what_does_not_go_with_it(make_settings: MakeSettings, changes: dict[str, Any], message: str) -> None:
    values = {"backend": "transformers", "model_name_or_path": "m", "saved_scores": True}
    with pytest.raises(ValueError, match=message):
        make_settings(Path(), **values | changes)


def test_dry_run_says_that_no_model_is_asked(settings: EvalSettings) -> None:
    assert "no model is asked" in describe_plan(change(settings, saved_scores=True))


def test_each_split_has_saved_scores_of_its_own(settings: EvalSettings, copy_splits: Callable[..., Path]) -> None:
    splits = change(settings, manifest=copy_splits(settings.data.manifest, (1, 2)), splits=(1, 2))
    expected = run_evaluation(splits).ranking.mean_ap
    before = read_json(settings.output.output_dir / "results.json")
    assert len(list_scores(settings)) == 2
    take_model_away(settings)
    assert run_evaluation(change(splits, saved_scores=True)).ranking.mean_ap == expected
    assert read_json(settings.output.output_dir / "results.json") == before


def test_processes_without_files_of_their_own_learn_from_the_first(
    settings: EvalSettings, run_together: Callable[..., list[Any]], tmp_path: Path
) -> None:
    expected = run_evaluation(settings).ranking.mean_ap
    take_model_away(settings)
    folders = settings.output.output_dir, tmp_path / "other_disk"
    runs = [partial(run_evaluation, change(settings, saved_scores=True, output_dir=folder)) for folder in folders]
    found = run_together(runs)
    assert [one.ranking.mean_ap for one in found] == [expected] * 2
    assert found[0].fingerprint == found[1].fingerprint


def test_trials_are_fused_and_measured_as_with_the_model(
    settings: EvalSettings, parse_layout: Callable[[str], Path]
) -> None:
    manifest = parse_layout("sysumm01")
    trials = change(settings, protocol="sysumm01", manifest=manifest, trials=3, max_queries=3, fusion="linear")
    run_evaluation(trials)
    expected = read_json(settings.output.output_dir / "results.json")
    assert len(expected["trials"]) == 3
    take_model_away(settings)
    run_evaluation(change(trials, saved_scores=True))
    assert read_json(settings.output.output_dir / "results.json") == expected
