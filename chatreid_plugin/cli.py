"""The ``chatreid`` command line: reads arguments, calls one function, prints what it returns; no logic.

Everything heavy is imported inside the commands, so that ``--help`` stays quick. Training is LLaMA-Factory's own
command: ``llamafactory-cli train examples/stage2.yaml``.
"""

import errno
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from . import __version__
from .errors import INTERRUPTED, ChatReIDError, DataError, end_on_sigterm
from .printing import say


if TYPE_CHECKING:
    from .config import BuildSettings


app = typer.Typer(
    name="chatreid",
    help="Person re-identification with vision-language models, a plugin for LLaMA-Factory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

# A full disk, a used-up quota, a limit of the shell.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the data engine.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace those of the file.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
Checkpoint = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint's folder or hub name.")]
ModelOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Section model of eval/*.yaml: model.dtype=bfloat16."),
]
Stage = Annotated[int, typer.Option(min=0, max=3, help="Image policy of the stage; 0 for none.")]


def _load_recipe(config: Path, overrides: list[str] | None) -> "BuildSettings":
    from .config import BuildSettings, load_settings

    return load_settings(config, overrides or [], BuildSettings)


def _show_version(wanted: bool) -> None:
    if wanted:
        say(f"chatreid-plugin {__version__}")
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
    say(f"{len(written)} file(s) copied into {directory}. Next: chatreid doctor")


@app.command()
def doctor(
    overrides: Overrides = None,
    recipe: Annotated[Path | None, typer.Option("--yaml", metavar="FILE", help="Check a training recipe too.")] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Evaluation file that has to have the recipe's image settings.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Report versions, the plugin's hooks in LLaMA-Factory, torchrun and GPUs; exit code 4 if something is wrong."""
    if recipe is not None:
        from .doctor import examine_with_recipe

        report = examine_with_recipe(recipe, overrides or [], compare)
    elif overrides or compare:
        raise typer.BadParameter("KEY=VALUE and --compare need --yaml FILE")
    else:
        from .doctor import examine

        report = examine()
    say(report.to_json() if as_json else report.render())
    raise typer.Exit(report.exit_code)


@app.command(name="list")
def list_datasets(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show one data set whole.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the data sets that `parse` reads: layout, published counts, licence and where to ask for them."""
    from .engine.inspect import dump_catalog, render_catalog, render_entry

    if as_json:
        say(dump_catalog(name))
    else:
        say(render_catalog() if name is None else render_entry(name))


@app.command()
def inspect(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Data set, as `chatreid list` names it.")],
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="Its folder.")],
    variant: Annotated[str | None, typer.Option(help="Form of the data set, e.g. v2; the first by default.")] = None,
    trial: Annotated[int, typer.Option(min=1, help="Which of its published splits.")] = 1,
    pattern: Annotated[str | None, typer.Option(help="For NAME `pattern`: {person}/{camera}_{index}.jpg")] = None,
    labels: Annotated[Path | None, typer.Option(help="For NAME `list`: CSV or JSON Lines file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what would be read from a raw data set; opens no image (CUHK03's raw .mat is unpacked first)."""
    from .engine.inspect import inspect_source

    summary = inspect_source(name, root, variant, trial, pattern, labels)
    say(summary.to_json() if as_json else summary.render())


@app.command()
def synth(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Data set, or NAME:VARIANT.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty folder.")],
    seed: Annotated[int, typer.Option(min=0, help="Names the synthetic people.")] = 0,
) -> None:
    """Write a few synthetic pedestrians in a data set's published layout, for trying things without the data."""
    from .demo.layouts import write_layout

    say(write_layout(name, directory, seed))


@app.command()
def parse(
    config: Config,
    overrides: Overrides = None,
    recheck: Annotated[bool, typer.Option("--recheck", help="Decode every image again, unchanged ones too.")] = False,
) -> None:
    """Read the raw data sets named in CONFIG and write their manifests."""
    from .engine.manifests import parse_sources

    for manifest in parse_sources(_load_recipe(config, overrides), recheck):
        say(manifest)


@app.command()
def caption(
    config: Config,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SOURCE]... [KEY=VALUE]...", help="Sources (all that train); settings to replace."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show number, price, time and prompt.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask about so many images at most.")] = None,
    batch_write: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write request files for OpenAI's Batch API instead.")
    ] = None,
    batch_read: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Read an output or error file of it; repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Ask an OpenAI-compatible endpoint for captions and attributes of the training images."""
    from .engine.captions.endpoint import caption_sources

    names = [argument for argument in arguments or [] if "=" not in argument]
    settings = _load_recipe(config, [item for item in arguments or [] if "=" in item])
    report = caption_sources(
        settings, names, dry_run=dry_run, limit=limit, batch_write=batch_write, batch_read=batch_read or []
    )
    say(report.to_json() if as_json else report.render())


@app.command(name="filter")
def filter_images(
    config: Config,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the contact sheets only, no list.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say how many training images are too poor, and show examples for each reason."""
    from .engine.screening.reports import filter_sources

    report = filter_sources(_load_recipe(config, overrides), dry_run=dry_run)
    say(report.to_json() if as_json else report.render())


@app.command()
def audit(
    config: Config,
    overrides: Overrides = None,
    write: Annotated[
        Path | None, typer.Option("--write", metavar="FILE", help="Write all leaks to FILE (.csv or .jsonl).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look for test images and test identities among the training images; exit code 3 if something leaks."""
    from .engine.screening.reports import audit_sources

    report = audit_sources(_load_recipe(config, overrides), write)
    say(report.to_json() if as_json else report.render())
    raise typer.Exit(report.exit_code)


@app.command()
def build(
    config: Config,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be built; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what other settings built.")] = False,
    as_json: AsJson = False,
) -> None:
    """Build the three stages' instruction data sets from the manifests."""
    from .engine.build import build_datasets

    settings = _load_recipe(config, overrides)
    report = build_datasets(settings, dry_run=dry_run, overwrite=overwrite)
    say(report.to_json() if as_json else report.render())


@app.command()
def show(
    directory: Annotated[Path, typer.Argument(metavar="DATASET_DIR", help="The output_dir of `chatreid build`.")],
    name: Annotated[str | None, typer.Argument(metavar="[NAME_OR_TASK]", help="One data set; all by default.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Records of each: 3 of one named, else 1.")] = None,
    start: Annotated[int, typer.Option(min=0, help="Number of the first record, from 0.")] = 0,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with the pictures inside.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show records of built data sets: images, prompt and answer."""
    from .engine.show import list_examples, render_json, render_text, write_page

    examples = list_examples(directory, name, start, count)
    if html is not None:
        write_page(html, examples)
    say(render_json(examples) if as_json else html or render_text(examples))


@app.command()
def stats(
    directory: Annotated[Path, typer.Argument(metavar="DATASET_DIR", help="The output_dir of `chatreid build`.")],
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="For the files; DATASET_DIR_stats.")] = None,
    as_json: AsJson = False,
) -> None:
    """Count what built data sets hold and compare it with their recipe; writes a page, figures and JSON."""
    from .engine.stats_page import write_statistics

    report = write_statistics(directory, output)
    say(report.to_json() if as_json else report.render())


@app.command()
def swap(
    encoder: Annotated[Path, typer.Argument(help="Checkpoint whose vision encoder is taken (Stage 1's output).")],
    decoder: Annotated[Path, typer.Argument(help="Checkpoint that gives everything else.")],
    output: Annotated[Path, typer.Argument(help="Folder of the composed checkpoint.")],
    projector: Annotated[Literal["encoder", "decoder"], typer.Option(help="Whose projector.")] = "encoder",
) -> None:
    """Compose a checkpoint from one model's vision encoder and another's decoder."""
    from .training.checkpoint import compose_checkpoint

    say(compose_checkpoint(encoder, decoder, output, projector))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def eval(context: typer.Context) -> None:
    """Evaluate a checkpoint; the same as python -m chatreid_plugin.eval."""
    from .eval.__main__ import main as run_evaluation

    raise typer.Exit(run_evaluation(context.args))


@app.command()
def serve(
    checkpoint: Checkpoint,
    overrides: ModelOverrides = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 opens it to other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    stage: Stage = 3,
    name: Annotated[str | None, typer.Option(help="Name of the model; the folder's by default.")] = None,
    api_key_variable: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable with the key that requests must show.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A further name by which the server may be called.")
    ] = None,
) -> None:
    """Serve a checkpoint as OpenAI's API does, with logprobs, and with scores (/v1/score)."""
    from .serve.server import run_server

    run_server(checkpoint, overrides or [], host, port, stage, name, api_key_variable, allowed_host or [])


@app.command()
def embed(
    checkpoint: Checkpoint,
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="Of `chatreid parse`.")],
    output: Annotated[Path, typer.Argument(metavar="OUT.npz", help="Gets `paths` and `features`.")],
    overrides: ModelOverrides = None,
    stage: Stage = 3,
    split: Annotated[
        list[str] | None, typer.Option(help="train, val, query or gallery; repeatable; all by default.")
    ] = None,
    image_root: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the images are; where the manifest says by default.")
    ] = None,
) -> None:
    """Write the vision features of a manifest's images, for filters and trackers; a killed run goes on."""
    from .eval.embedding import embed_manifest

    say(embed_manifest(checkpoint, manifest, output, overrides or [], stage, split or [], image_root).render())


@app.command()
def search(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[GALLERY] [KEY=VALUE]...",
            help="A folder, a .csv list or a manifest; keys of eval/*.yaml, e.g. filter.top_k=50.",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="CHECKPOINT", help="Who ranks; without it, colours alone do.")
    ] = None,
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="A photo of the person.")] = None,
    box: Annotated[str, typer.Option(metavar="X,Y,W,H", help="Where in the photo the person is, in pixels.")] = "",
    use: Annotated[str | None, typer.Option(metavar="HIT", help="A hit as the photo: rank, path or hash.")] = None,
    text: Annotated[str, typer.Option(help="What the person looks like.")] = "",
    attribute: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Repeatable.")] = None,
    weight: Annotated[float | None, typer.Option(min=0, help="How much words count beside the photo.")] = None,
    same: Annotated[list[str] | None, typer.Option(metavar="HIT", help="It is the one; repeatable.")] = None,
    different: Annotated[
        list[str] | None, typer.Option("--not", metavar="HIT", help="It is not the one; repeatable.")
    ] = None,
    camera: Annotated[list[str] | None, typer.Option(help="Only this one; repeatable.")] = None,
    after: Annotated[str, typer.Option(metavar="TIME", help="Taken no earlier, e.g. 2026-03-01T14:30.")] = "",
    before: Annotated[str, typer.Option(metavar="TIME", help="Taken no later.")] = "",
    unknown: Annotated[list[str] | None, typer.Option(metavar="NAME", help="An attribute that nobody knows.")] = None,
    forget: Annotated[
        list[str] | None, typer.Option(metavar="WHAT", help="Drop what was asked before: image, text, cameras, ...")
    ] = None,
    session: Annotated[Path | None, typer.Option(metavar="FILE", help="Go on with it, and save it there.")] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Go back to the turn before first.")] = False,
    turn: Annotated[int | None, typer.Option(metavar="N", help="Go to this turn first.")] = None,
    question: Annotated[bool, typer.Option("--question", help="Say what to ask the witness next.")] = False,
    why: Annotated[str | None, typer.Option(metavar="HIT", help="Compare it with the photo, in words.")] = None,
    say_words: Annotated[str, typer.Option("--say", metavar="WORDS", help="What to ask about --why's hit.")] = "",
    top: Annotated[int, typer.Option(min=1, help="How many images to show.")] = 10,
    export: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help=".csv, .json or .html (contact sheet); repeatable.")
    ] = None,
    index: Annotated[Path | None, typer.Option(metavar="DIR", help="GALLERY.chatreid beside it by default.")] = None,
    stage: Stage = 3,
    operator: Annotated[str, typer.Option(help="Who searches, for the log.")] = "",
    as_json: AsJson = False,
) -> None:
    """Search your own pictures in dialogue, for a photo, words or both; needs no labels."""
    from .search.command import open_or_resume, read_attributes, read_box, run_search

    asked = {"image": image, "box": read_box(box), "use": use, "text": text, "weight": weight, "same": same}
    asked |= {"attributes": read_attributes(attribute or []), "different": different, "cameras": camera}
    asked |= {"after": after, "before": before, "unknown": unknown, "forget": forget}
    opened = open_or_resume(arguments or [], session, model, stage, index, operator)
    told = run_search(
        opened,
        asked,
        file=session,
        undo=undo,
        turn=turn,
        question=question,
        why=why,
        words=say_words,
        top=top,
        exports=export or [],
        as_json=as_json,
    )
    say(told)


@app.command(name="tiny-model")
def write_model(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the checkpoint.")],
    people: Annotated[int, typer.Option(help="Synthetic people whose words it learns.")] = 600,
    warm_up_steps: Annotated[int, typer.Option(help="Steps of language training; 0 keeps random weights.")] = 500,
    seed: Annotated[int, typer.Option(help="Of the weights and the texts.")] = 0,
) -> None:
    """Write a tiny Qwen2-VL that stock LLaMA-Factory can load, for trying things without any download."""
    from .demo.people import sample_people
    from .demo.tiny_model import write_tiny_model

    write_tiny_model(directory, sample_people(people, 0), warm_up_steps=warm_up_steps, seed=seed)
    say(directory)
    say(f"Next: llamafactory-cli train RECIPE.yaml model_name_or_path={directory}", aside=True)


@app.command()
def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Output folders of evaluations, or folders above.")
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where the page goes.")] = Path("comparison"),
    as_json: AsJson = False,
) -> None:
    """Compare evaluations with each other and with the paper's tables: a page, curves and the radar of figure 1."""
    from .eval.comparison import dump_comparison, render_text, write_comparison

    runs = write_comparison(folders, output)
    say(dump_comparison(runs) if as_json else render_text(runs))
    say(f"Written to {output}: comparison.html, comparison.json, cmc.png, radar.png", aside=True)


@app.command()
def demo(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for everything the demo makes.")],
    quick: Annotated[bool, typer.Option("--quick", help="Fewer people and fewer steps.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start again in a folder already used.")] = False,
    seed: Annotated[int, typer.Option(help="Of the model, the records and the training.")] = 0,
) -> None:
    """Run the whole way on synthetic pedestrians and a tiny model: no weights, no network, no GPU."""
    from .demo.pipeline import run_demo

    run_demo(directory, quick=quick, overwrite=overwrite, seed=seed)


def exit_with(error: ChatReIDError) -> NoReturn:
    """Print the error's message alone on stderr and exit with its code."""
    say(f"chatreid: {error}", aside=True)
    sys.exit(error.exit_code)


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 130 interrupted (Ctrl-C or SIGTERM), else the error's code."""
    try:
        try:
            with end_on_sigterm():
                app(prog_name="chatreid")
        finally:
            sys.stdout.flush()
    except ChatReIDError as error:
        exit_with(error)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except OSError as error:
        if error.errno not in (*_NO_ROOM, errno.EPIPE):
            raise
        # Python writes what is left once more as it ends, and would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:  # the reader, such as `head`, has enough
            sys.exit(1)
        exit_with(DataError(f"{error.filename or 'The output'} cannot be written: {error.strerror}. Make room first."))
    sys.exit(0)
