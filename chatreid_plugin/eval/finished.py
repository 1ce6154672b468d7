"""Finished evaluations, read back from their folders, and whether they can be compared; used by ``comparison``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ..errors import DataError
from ..eval_settings import PROTOCOL_CHOICES
from ..shards import read_json


PUBLISHED = Path(__file__).with_name("published.yaml")

# What runs of one benchmark have to agree in, as in the protocol of results.json.
DEFINING = ("variant", "average_precision", "cmc", "ties", "queries", "gallery")

# mAP and Rank-1 in percent; None where nobody measured it.
Cell = tuple[float | None, float | None]


@dataclass(frozen=True, slots=True)
class Run:
    """One finished evaluation, read from its ``results.json``.

    Attributes:
        folder: where it lies.
        scorer: the checkpoint, server's model, file or backend that scored.
        benchmark: data set, as ``published.yaml`` names it.
        content: the whole of ``results.json``; metrics are fractions.
    """

    folder: Path
    scorer: str
    benchmark: str
    content: Mapping[str, Any]

    @property
    def cell(self) -> Cell:
        """MAP and Rank-1 in percent."""
        metrics = self.content["metrics"]
        return 100.0 * metrics["mAP"], 100.0 * metrics["Rank-1"]

    @property
    def protocol(self) -> Mapping[str, Any]:
        """Name, variant and definitions of what was measured."""
        return self.content["protocol"]

    @property
    def variant(self) -> str:
        """The protocol's variant without its rule, which follows from it, and what else makes other numbers."""
        most, definition = self.content["settings"]["max_queries"], self.protocol["average_precision"]
        parts = [str(self.protocol["variant"]).replace(f", {self.protocol['ignored']}", "")]
        parts += [f"at most {most} queries"] if most is not None else []
        parts += [self.protocol["unlike_published"]] if self.protocol["unlike_published"] else []
        return ", ".join([*parts, f"AP {definition}"] if definition != "mean" else parts)

    @property
    def traits(self) -> dict[str, str]:
        """How it was asked and measured, in words: what runs of one scorer may differ in besides the benchmark."""
        settings = self.content["settings"]
        fusion = settings["fusion"]
        asked = settings["backend"] in ("transformers", "http", "random", "oracle")
        weight = f" {settings['fusion_weight']}" if fusion in ("linear", "k_reciprocal") else ""
        return {
            "mode": f"mode {settings['mode']}" if asked else "",
            "fusion": f"fusion {fusion}{weight}",
            "filter": self.filter,
        }

    @property
    def filter(self) -> str:
        """Source and cap of its filter."""
        source, most = self.content["filter"]["source"], self.content["settings"]["top_k"]
        return f"filter {source}" if source == "none" or most is None else f"filter {source}, top {most}"

    @property
    def key(self) -> tuple[str, ...]:
        """What the runs of one row of a table share; a filter may differ, as words cannot be filtered by images."""
        return self.scorer, self.traits["mode"], self.traits["fusion"], self.protocol["average_precision"]


def read_run(folder: Path) -> Run:
    """Return the evaluation of a folder.

    Raises:
        DataError: there is no finished evaluation, or its ``results.json`` is of another kind or version.
    """
    path = folder / "results.json"
    if not path.is_file():
        advice = "An evaluation writes it when it is finished: python -m chatreid_plugin.eval CONFIG.yaml"
        raise DataError(f"{path} does not exist. {advice}")
    content = read_json(path)
    try:
        protocol = content["protocol"]
        run = Run(folder, content["scores"]["scorer"], str(protocol["name"]).partition("_")[0], content)
        _ = run.cell, run.variant, run.key, content["filter"]["recall_at"], content["cmc_curve"], content["warnings"]
        _ = [protocol[key] for key in DEFINING]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no results.json of this version (it lacks {error}). Evaluate again; saved scores are used."
        ) from None
    return run


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """Return the folders of finished evaluations, each once: those given, and all below a folder that is none itself.

    The splits of an evaluation lie below it and are no evaluations of their own here.

    Raises:
        DataError: a folder has no finished evaluation, nor has any below it.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        below = [folder] if (folder / "results.json").is_file() else _list_below(folder)
        if not below:
            raise DataError(
                f"{folder} has no results.json, nor has any folder below it. An evaluation writes it into its "
                "output_dir when it is finished: python -m chatreid_plugin.eval CONFIG.yaml"
            )
        for path in below:
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _list_below(folder: Path) -> list[Path]:
    every = {path.parent for path in folder.rglob("results.json")}
    return sorted(path for path in every if every.isdisjoint(path.parents))


@cache
def read_published() -> Mapping[str, Any]:
    """Return what the paper prints (``published.yaml``)."""
    return yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))


def list_unlike_published(run: Run) -> list[str]:
    """Return, in words, how a run was measured otherwise than the published rows of its benchmark."""
    published = read_published()["measured_as"]
    settings: Mapping[str, Any] = run.content["settings"]
    found: list[str] = []
    for key, wanted in {**published["all"], **published.get(run.benchmark, {})}.items():
        choices = PROTOCOL_CHOICES.get(key, {}).get(run.benchmark, (None,))
        value = choices[0] if settings.get(key) is None else settings[key]
        if value != wanted and (value or wanted):
            found.append(f"{key} is {value}, theirs {wanted or 'not set'}")
    if run.protocol["unlike_published"]:
        found.append(f"queries x gallery images are {run.protocol['unlike_published']}")
    return found


def find_unlike_published(runs: Sequence[Run]) -> list[str]:
    """Return, in words, which runs cannot be compared with the published rows beside them, and why."""
    known = {benchmark for table in read_published()["tables"] for benchmark in table["benchmarks"]}
    reasons = [(run, list_unlike_published(run)) for run in runs if run.benchmark in known]
    return [f"{run.benchmark} in {run.folder}: {'; '.join(found)}" for run, found in reasons if found]


def find_disagreements(runs: Sequence[Run]) -> list[str]:
    """Return, in words, why runs of one benchmark cannot be compared: other definitions, other queries, other ties."""
    found: list[str] = []
    for benchmark in dict.fromkeys(run.benchmark for run in runs):
        same = [run for run in runs if run.benchmark == benchmark]
        for key in DEFINING:
            values = sorted({str(run.protocol[key]) for run in same})
            if len(values) > 1:
                found.append(f"{benchmark}: runs differ in {key}: {' | '.join(values)}")
    return found


def find_warnings(runs: Sequence[Run]) -> list[str]:
    """Return what the runs' own files say has to be known before their figures are quoted."""
    return [f"{run.benchmark} in {run.folder}: {text}" for run in runs for text in run.content["warnings"]]


def find_differences(runs: Sequence[Run]) -> list[str]:
    """Return, in words, in what runs beside each other differ without being wrong: mode, filter, fusion."""
    found: list[str] = []
    for key in ("mode", "filter", "fusion"):
        values = sorted({run.traits[key] for run in runs} - {""})
        if len(values) > 1:
            found.append(f"runs differ in {key}: {' | '.join(values)}")
    return found
