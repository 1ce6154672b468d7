"""Command line of the evaluator: ``python -m chatreid_plugin.eval CONFIG.yaml ... [key=value ...]``."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import INTERRUPTED, ChatReIDError, end_on_sigterm
from ..printing import log_warnings, say
from .batch import compare_evaluations, describe_plan, load_evaluations, run_evaluations
from .comparison import render_text
from .distributed import is_first_process, join_processes
from .report import Results, render_table
from .settings import EvalSettings


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        prog="python -m chatreid_plugin.eval",
        description="Measure a checkpoint on person Re-ID benchmarks. A killed run goes on where it stopped. "
        "On several GPUs or machines: torchrun --nproc-per-node 8 -m chatreid_plugin.eval CONFIG.yaml",
        epilog="Example: python -m chatreid_plugin.eval eval/market1501.yaml eval/msmt17_v2.yaml "
        "model.model_name_or_path=saves/stage3 filter.top_k=50",
    )
    parser.add_argument(
        "arguments",
        nargs="+",
        metavar="CONFIG.yaml | key=value",
        help="what to evaluate, e.g. eval/market1501.yaml or eval/*.yaml; keys to change in all of them",
    )
    parser.add_argument("--skip-missing", action="store_true", help="leave out files whose manifest does not exist")
    output = parser.add_mutually_exclusive_group()
    output.add_argument(
        "--json", action="store_true", help="print results.json, of several files a list of them, and nothing else"
    )
    output.add_argument("--dry-run", action="store_true", help="say what would be done; write nothing")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code (0 done, 2 configuration, 3 data, 4 model, 130 interrupted)."""
    parser = build_parser()
    options = parser.parse_intermixed_args(argv)
    configs = [Path(item) for item in options.arguments if "=" not in item]
    overrides = [item for item in options.arguments if "=" in item]
    if not configs:
        parser.error("name at least one CONFIG.yaml")
    log_warnings()
    try:
        evaluations = load_evaluations(configs, overrides, skip_missing=options.skip_missing)
        if options.dry_run:
            if is_first_process():
                say("\n\n".join(map(describe_plan, evaluations)))
            return 0
        with end_on_sigterm(), join_processes() as processes:
            results = run_evaluations(evaluations, processes)
        if processes.is_first:
            _show(evaluations, results, as_json=options.json)
        return 0
    except ChatReIDError as error:
        say(f"Error: {error}", aside=True)
        return error.exit_code
    except KeyboardInterrupt:
        # A resumed run must not throw away what this one saved.
        kept = [override for override in overrides if not override.startswith("output.overwrite=")]
        skip = ["--skip-missing"] if options.skip_missing else []
        command = shlex.join([*map(str, configs), *skip, *kept, "output.overwrite=false"])
        say(
            f"\nInterrupted; finished queries are saved. Resume with:\n  python -m chatreid_plugin.eval {command}",
            aside=True,
        )
        return INTERRUPTED


def _show(evaluations: Sequence[EvalSettings], results: Sequence[Results], *, as_json: bool) -> None:
    """Print the table of one evaluation, or write and print the comparison of several."""
    folders = [settings.output.output_dir for settings in evaluations]
    several = len(evaluations) > 1
    runs, page = compare_evaluations(evaluations) if several else ([], None)
    if as_json:
        texts = [(folder / "results.json").read_text(encoding="utf-8").rstrip("\n") for folder in folders]
        say("[" + ",\n".join(texts) + "]" if several else texts[0])
    elif several:
        say(render_text(runs))
        say("\n".join(["\nresults.json, rankings.parquet and report.html are in:", *(f"  {one}" for one in folders)]))
        say(f"Compared in {page}: comparison.html, comparison.json, cmc.png, radar.png")
    else:
        say(render_table(results[0]))
        say(f"\nWritten to {folders[0]}: results.json, rankings.parquet, report.html")


if __name__ == "__main__":
    sys.exit(main())
