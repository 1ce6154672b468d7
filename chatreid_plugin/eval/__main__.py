"""Command line of the evaluator: ``python -m chatreid_plugin.eval CONFIG.yaml [key=value ...]``; it holds no logic."""

import argparse
import logging
import shlex
import sys
from pathlib import Path

from ..config import load_settings
from ..errors import ChatReIDError
from ..eval_settings import EvalSettings
from ..interruption import end_on_sigterm
from ..printing import PrintableFormatter, say
from .candidates import describe_plan
from .distributed import is_first_process, join_processes
from .pipeline import run_evaluation
from .report import render_table


INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        prog="python -m chatreid_plugin.eval",
        description="Measure a checkpoint on a person Re-ID benchmark. A killed run goes on where it stopped. "
        "On several GPUs or machines: torchrun --nproc-per-node 8 -m chatreid_plugin.eval CONFIG.yaml",
        epilog="Example: python -m chatreid_plugin.eval eval/market1501.yaml model_name_or_path=saves/stage3 top_k=50",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="what to evaluate, e.g. eval/market1501.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="change a key of the YAML")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print results.json on standard output, and nothing else")
    output.add_argument("--dry-run", action="store_true", help="say what would be done; write nothing")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code (0 done, 2 configuration, 3 data, 4 model, 130 interrupted)."""
    arguments = build_parser().parse_intermixed_args(argv)
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        settings = load_settings(arguments.config, arguments.overrides, EvalSettings)
        if arguments.dry_run:
            if is_first_process():
                say(describe_plan(settings))
            return 0
        with end_on_sigterm(), join_processes() as processes:
            results = run_evaluation(settings, processes)
        if not processes.is_first:
            return 0
        if arguments.json:
            say((settings.output_dir / "results.json").read_text(encoding="utf-8").rstrip("\n"))
        else:
            say(render_table(results))
            say(f"\nWritten to {settings.output_dir}: results.json, rankings.parquet, report.html")
        return 0
    except ChatReIDError as error:
        say(f"Error: {error}", aside=True)
        return error.exit_code
    except KeyboardInterrupt:
        # A resumed run must not throw away what this one saved.
        overrides = [override for override in arguments.overrides if not override.startswith("overwrite=")]
        command = shlex.join([str(arguments.config), *overrides, "overwrite=false"])
        say(
            f"\nInterrupted; finished queries are saved. Resume with:\n  python -m chatreid_plugin.eval {command}",
            aside=True,
        )
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
