"""The ``chatreid`` command line: reads arguments, calls one function, prints what it returns; no logic.

Everything heavy is imported inside the commands, so that ``--help`` stays quick. Training is LLaMA-Factory's own
command: ``llamafactory-cli train examples/stage2.yaml``.
"""

import sys
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from . import __version__
from .errors import ChatReIDError


app = typer.Typer(
    name="chatreid",
    help="Person re-identification with vision-language models, a plugin for LLaMA-Factory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the data engine.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace those of the file.")
]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"chatreid-plugin {__version__}")
        raise typer.Exit


@app.callback()
def _read_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Person re-identification with vision-language models, a plugin for LLaMA-Factory."""


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for examples/, eval/ and dataset_info/.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that differ.")] = False,
) -> None:
    """Copy the recipes, evaluation files and data set table into DIR."""
    from .resources import copy_resources

    written = copy_resources(directory, force=force)
    print(f"{len(written)} file(s) copied into {directory}. Next: chatreid doctor")


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")] = False,
) -> None:
    """Report versions, the plugin's hooks in LLaMA-Factory, torchrun and GPUs; exit code 4 if something is wrong."""
    from .doctor import examine

    report = examine()
    print(report.to_json() if as_json else report.render())
    raise typer.Exit(report.exit_code)


@app.command()
def parse(config: Config, overrides: Overrides = None) -> None:
    """Read the raw data sets named in CONFIG and write their manifests."""
    from .config import BuildSettings, load_settings
    from .engine.sources import parse_sources

    for manifest in parse_sources(load_settings(config, overrides or [], BuildSettings)):
        print(manifest)


@app.command()
def build(
    config: Config,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be built; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what other settings built.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")] = False,
) -> None:
    """Build the three stages' instruction data sets from the manifests."""
    from .config import BuildSettings, load_settings
    from .engine.runner import build_datasets

    settings = load_settings(config, overrides or [], BuildSettings)
    report = build_datasets(settings, dry_run=dry_run, overwrite=overwrite)
    print(report.to_json() if as_json else report.render())


@app.command()
def swap(
    encoder: Annotated[Path, typer.Argument(help="Checkpoint whose vision encoder is taken (Stage 1's output).")],
    decoder: Annotated[Path, typer.Argument(help="Checkpoint that gives everything else.")],
    output: Annotated[Path, typer.Argument(help="Folder of the composed checkpoint.")],
    projector: Annotated[Literal["encoder", "decoder"], typer.Option(help="Whose projector.")] = "encoder",
) -> None:
    """Compose a checkpoint from one model's vision encoder and another's decoder."""
    from .training.checkpoint import compose_checkpoint

    print(compose_checkpoint(encoder, decoder, output, projector))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def eval(context: typer.Context) -> None:
    """Evaluate a checkpoint; the same as python -m chatreid_plugin.eval."""
    from .eval.__main__ import main as run_evaluation

    raise typer.Exit(run_evaluation(context.args))


@app.command(name="tiny-model")
def write_model(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the checkpoint.")],
    people: Annotated[int, typer.Option(help="Synthetic people whose words it learns.")] = 600,
    warm_up_steps: Annotated[int, typer.Option(help="Steps of language training; 0 keeps random weights.")] = 500,
) -> None:
    """Write a tiny Qwen2-VL that stock LLaMA-Factory can load, for trying things without any download."""
    from .demo.people import sample_people
    from .demo.tiny_model import write_tiny_model

    write_tiny_model(directory, sample_people(people, 0), warm_up_steps=warm_up_steps)
    print(directory)


@app.command()
def demo(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for everything the demo makes.")],
    quick: Annotated[bool, typer.Option("--quick", help="Fewer people and fewer steps.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start again in a folder already used.")] = False,
) -> None:
    """Run the whole way on synthetic pedestrians and a tiny model: no weights, no network, no GPU."""
    from .demo.pipeline import run_demo

    run_demo(directory, quick=quick, overwrite=overwrite)


def exit_with(error: ChatReIDError) -> NoReturn:
    """Print the error's message alone on stderr and exit with its code."""
    print(f"chatreid: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 130 interrupted, else the error's code."""
    try:
        app(prog_name="chatreid")
    except ChatReIDError as error:
        exit_with(error)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
