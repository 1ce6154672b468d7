"""Every evaluation of ``eval/`` on its own synthetic layout: oracle, chance, random scores and a checkpoint.

Each file runs as it is shipped, four of them in the modes choice and turns as well; its filter may be the
checkpoint's own, so oracle, chance and random scores go without one. Prints a Markdown table; exit code 1 if the
oracle is not perfect or a run fails. Scores stay in --work, so that a run that was stopped goes on there. With
--questions: what each file asks, and who trained it; no model is needed.
Run: OMP_NUM_THREADS=1 python tests/bench/run_protocols.py CHECKPOINT [KEY=VALUE ...] [--case NAME ...] [--work DIR]
     python tests/bench/run_protocols.py --questions
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parents[1] / "eval"))  # the tests' table of cases

import numpy as np
import yaml
from conftest import CASES, Case

from chatreid_plugin.config import BuildSettings, load_settings
from chatreid_plugin.errors import ChatReIDError
from chatreid_plugin.eval.candidates import make_plan
from chatreid_plugin.eval.loader import load_benchmark
from chatreid_plugin.eval.measure import measure
from chatreid_plugin.eval.questions import list_pair_tasks, pick_choice_task
from chatreid_plugin.eval.report import Results
from chatreid_plugin.eval.run import run_evaluation
from chatreid_plugin.eval.settings import EvalSettings
from chatreid_plugin.eval.splits import choose_split
from chatreid_plugin.shards import read_json, write_json
from chatreid_plugin.tasks import TASKS


# One of each kind of query: an image, a caption, attributes, an image with words.
ASKED_IN_ALL_MODES = ("market1501-market1501", "cuhkpedes-cuhkpedes", "attributes-peta", "multimodal-cuhkpedes")
FULL_RECIPE = Path(__file__).parents[2] / "examples" / "data_engine_full.yaml"
QUESTIONS_HEAD = ("eval/", "mode", "question", "task", "trained in Stage", "share of Stage 3's mix")
HEAD = ("eval/", "layout", "mode", "queries", "pairs", "oracle", "chance", "random", "model", "pairs/s", "confidence")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    case: Case
    mode: str

    def run(self, root: Path, model: Mapping[str, Any]) -> list[str]:
        """Evaluate with every scorer; return the cells after the mode.

        Raises:
            ChatReIDError: a run failed.
        """
        oracle = self.evaluate(root, backend="oracle", filter="none")
        random = self.evaluate(root, backend="random", filter="none")
        started = time.monotonic()
        found = self.evaluate(root, backend="transformers", **model)
        speed = note_speed(found, time.monotonic() - started)
        queries = f"{found.ranking.valid_queries}"
        chance = compute_chance(found.settings.replace(filter={"source": "none"}))
        return [queries, f"{found.pairs}", quote(oracle), chance, quote(random), quote(found), speed, found.confidence]

    def evaluate(self, root: Path, **changes: Any) -> Results:
        """Run the evaluation; a random scorer and an oracle are asked in the row's mode, too."""
        output = root / "results" / f"{self.case.name}-{self.mode}" / changes["backend"]
        return run_evaluation(self.case.load(root, mode=self.mode, output_dir=output, report_queries=1, **changes))


def list_rows(names: Collection[str]) -> list[Row]:
    """Return the cases in mode pointwise, and some in the others."""
    rows = [Row(CASES[name], "pointwise") for name in CASES if name in names]
    asked = [name for name in ASKED_IN_ALL_MODES if name in names]
    return rows + [Row(CASES[name], mode) for name in asked for mode in ("choice", "turns")]


def quote(results: Results) -> str:
    """Return mAP and Rank-1 in percent; whole numbers only where they are exact."""
    return format_percent(results.ranking.mean_ap, results.ranking.cmc[1])


def format_percent(*shares: float) -> str:
    """Return shares in percent."""
    return " / ".join("100" if round(share, 12) == 1 else f"{100 * share:.1f}" for share in shares)


def compute_chance(settings: EvalSettings) -> str:
    """Return the exact expectation over random orders of the gallery, as ``quote`` does."""
    found: list[tuple[float, float]] = []
    for one in [choose_split(settings, split) for split in settings.data.splits] or [settings]:
        plan = make_plan(one)
        tied = [np.zeros(len(kept), dtype=np.float32) for kept in plan.kept]
        metrics = measure(plan, plan.share_scores(tied)).ranking
        found.append((metrics.mean_ap, metrics.cmc[1]))
    return format_percent(*np.mean(found, axis=0).tolist())


def note_speed(results: Results, seconds: float) -> str:
    """Return pairs a second of the run that scored them, which is noted beside the scores for a later one."""
    first = results.splits[0] if results.splits else results
    note = first.scores_path.with_suffix(".seconds.json")
    if not note.is_file():
        write_json(note, {"seconds": seconds})
    return f"{results.pairs / read_json(note)['seconds']:.0f}"


def run_rows(rows: Sequence[Row], root: Path, model: Mapping[str, Any]) -> list[list[str]]:
    """Return the lines of the table; each is told of as it is done."""
    lines: list[list[str]] = []
    for number, row in enumerate(rows, start=1):
        changes = [f"{key}={value}" for key, value in row.case.changes.items()]
        line = [row.case.recipe, " ".join([row.case.layout, *changes]), row.mode]
        try:
            line += row.run(root, model)
        except ChatReIDError as error:
            line += [f"FAILED: {error}".splitlines()[0]]
        lines.append(line)
        print(f"{number}/{len(rows)} {', '.join(line)}", file=sys.stderr, flush=True)
    return lines


def list_questions(root: Path) -> list[list[str]]:
    """Return for each file of ``eval/`` what its queries are asked with, and that task's share of the full recipe.

    The files ask in mode pointwise; what ``choice`` and ``turns`` would ask of the same queries follows.
    """
    ratios = load_settings(FULL_RECIPE, [], BuildSettings).stage3_ratios
    first = {case.recipe: case for case in reversed(CASES.values())}
    lines: list[list[str]] = []
    for name, case in sorted(first.items()):
        settings = case.load(root)
        settings = choose_split(settings, settings.data.splits[0]) if settings.data.splits else settings
        queries = load_benchmark(settings.data).queries
        pairs = {
            task: None
            for query in queries
            for task in list_pair_tasks(query, settings.scoring.text_weight is not None)
        }
        choices = {pick_choice_task(settings.scoring, settings.data.benchmark, query): None for query in queries}
        for mode, tasks in (("pointwise", pairs), ("choice, turns", choices)):
            for task in tasks:
                share = ratios.get(task, 0) / sum(ratios.values())
                stages = ", ".join(map(str, TASKS[task].stages))
                shown = f"{100 * share:.3g} %" if share else ""
                lines.append([name, mode, TASKS[task].prompts[0], task, stages, shown])
    return lines


def print_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for line in lines:
        print(f"| {' | '.join(line)} |")


def main() -> int:
    """Run all rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?", help="a folder, or an adapter's")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. image_max_pixels=8192")
    parser.add_argument("--case", action="append", choices=list(CASES), help="only these")
    parser.add_argument("--work", type=Path, help="write here and keep it")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--questions", action="store_true", help="only say what is asked and what trained it")
    options = parser.parse_intermixed_args()
    if options.questions:
        with tempfile.TemporaryDirectory() as temporary:
            lines = list_questions(options.work or Path(temporary))
        print_table(QUESTIONS_HEAD, lines)
        return int(not all(map(all, lines)))
    if options.checkpoint is None:
        parser.error("name a checkpoint")
    model: dict[str, Any] = {"model_name_or_path": options.checkpoint, "device": options.device}
    model |= {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in options.overrides)}
    with tempfile.TemporaryDirectory() as temporary:
        lines = run_rows(list_rows(options.case or CASES), options.work or Path(temporary), model)
    print(f"{datetime.now(UTC):%Y-%m-%d}, {options.device}; mAP / Rank-1 in percent\n")
    print_table(HEAD, lines)
    return int(any(len(line) < len(HEAD) or line[HEAD.index("oracle")] != "100 / 100" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
