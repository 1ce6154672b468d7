"""What a recipe reads has to be there: its data sets, and the checkpoints it starts from.

LLaMA-Factory says "Undefined dataset" or "Failed to load tokenizer" below a traceback, after a minute of imports.
"""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..shards import DATASET_INFO, HELD_OUT, LEFT_OUT, read_json
from .checkpoint import COMPOSED_FOLDER, MARKER, is_hub_name
from .recipe import Finding, Recipe
from .recipe_model import advise_start, find_model_folder, list_checkpoints


# `dataset: chatreid_stage2` stands for all data sets of the stage that `chatreid build` made.
_STAGE_NAME = re.compile(r"chatreid_stage[123]")


def is_local(dataset_dir: Any) -> bool:
    """Return whether ``dataset_dir`` names a folder, and no hub or mapping, which LLaMA-Factory takes as well."""
    return isinstance(dataset_dir, str) and dataset_dir != "ONLINE" and not dataset_dir.startswith("REMOTE:")


def expand_stages(names: Sequence[str] | None, dataset_dir: Any, held_out: bool = False) -> list[str] | None:
    """Return the names with each stage's name replaced by the data sets that ``chatreid build`` made for it.

    They are concatenated by LLaMA-Factory, so that the mix is the build's own. A stage of which nothing was built
    keeps its name, which ``check_dataset_names`` refuses with the reasons.

    Args:
        names: data sets, e.g. ``["chatreid_stage2"]``.
        dataset_dir: where ``dataset_info.json`` lies.
        held_out: take the data sets of people who do not train.
    """
    if not names or not is_local(dataset_dir) or not any(map(_STAGE_NAME.fullmatch, names)):
        return None if names is None else list(names)
    path = Path(dataset_dir) / DATASET_INFO
    entries: Any = read_json(path) if path.is_file() else {}
    expanded: list[str] = []
    for name in names:
        found = list_built(name, entries, held_out) if _STAGE_NAME.fullmatch(name) and name not in entries else []
        expanded += found or [name]
    return list(dict.fromkeys(expanded))


def list_built(stage_name: str, entries: Iterable[str], held_out: bool = False) -> list[str]:
    """Return the entries that are data sets of a stage (``chatreid_stage2``), trained or held out."""
    return [e for e in entries if e.startswith(f"{stage_name}_") and e.endswith(HELD_OUT) == held_out]


def check_left_out(recipe: Recipe) -> list[Finding]:
    """Name the tasks of a stage that is trained whole for which the sources had no labels."""
    data = recipe.data
    if not is_local(data.dataset_dir):
        return []
    if not all((Path(data.dataset_dir) / name).is_file() for name in (DATASET_INFO, LEFT_OUT)):
        return []
    entries, left_out = (read_json(Path(data.dataset_dir) / name) for name in (DATASET_INFO, LEFT_OUT))
    named = set(data.dataset or ())
    findings: list[Finding] = []
    for stage in (1, 2, 3):
        prefix = f"chatreid_stage{stage}"
        built = list_built(prefix, entries)
        reasons = {
            name.removeprefix(f"{prefix}_"): reason
            for name, reason in left_out.items()
            if name in list_built(prefix, left_out) and name not in entries and not reason.startswith("no share in")
        }
        if built and reasons and named.issuperset(built):
            found = f"Stage {stage} trains {len(built)} of {len(built) + len(reasons)} tasks, without "
            advice = "Add the labels (`chatreid caption`) and build again, or go on without them"
            findings.append(Finding("data", "warning", found + _describe_missing(dict(reasons)), advice))
    return findings


def check_dataset_names(recipe: Recipe) -> list[Finding]:
    """Compare the data sets that a recipe names with those that are entered; says why one is not, and what to do."""
    data = recipe.data
    if not is_local(data.dataset_dir):
        return []
    folder = Path(data.dataset_dir)
    if not (folder / DATASET_INFO).is_file():
        found = f"dataset_dir: {folder} " + (f"has no {DATASET_INFO}" if folder.is_dir() else "is not a folder")
        advice = "Build the data with `chatreid build`, or start in the folder that dataset_dir is relative to"
        return [Finding("data", "error", found, advice)]
    entries: dict[str, Any] = read_json(folder / DATASET_INFO)
    named = list(dict.fromkeys([*(data.dataset or ()), *(data.eval_dataset or ())]))
    missing = [name for name in named if name not in entries]
    if not missing:
        return []
    left_out = read_json(folder / LEFT_OUT) if (folder / LEFT_OUT).is_file() else {}
    reasons = {name: _find_reason(name, left_out) for name in missing}
    found = (
        f"{len(missing)} of {len(named)} data set(s) are not in {folder / DATASET_INFO}: {_describe_missing(reasons)}"
    )
    return [Finding("data", "error", found, _advise_missing(reasons, recipe, entries))]


def _find_reason(name: str, left_out: dict[str, str]) -> str | None:
    """Return why a data set, or all of a stage, was left out."""
    if not _STAGE_NAME.fullmatch(name):
        return left_out.get(name)
    return "; ".join(dict.fromkeys(left_out[task] for task in list_built(name, left_out))) or None


def _describe_missing(reasons: dict[str, str | None]) -> str:
    """Return the names, those that were left out for one reason together."""
    parts: list[str] = []
    for reason in dict.fromkeys(reasons.values()):
        names = ", ".join(name for name, other in reasons.items() if other == reason)
        parts.append(names if reason is None else f"{names} (left out by `chatreid build`: {reason})")
    return "; ".join(parts)


def _advise_missing(reasons: dict[str, str | None], recipe: Recipe, entries: Iterable[str]) -> str:
    stage = recipe.data.chatreid_stage
    words = ("no captions", "no attributes")
    if any(word in (reason or "") for reason in reasons.values() for word in words):
        remedy = "Name captions in the data engine's source (`chatreid caption` writes them) and build again"
    elif any(reasons.values()):
        remedy = "Add data that has the labels and build again"
    else:
        remedy = (
            f"Build with `chatreid build`, or correct the name; entered are {', '.join(sorted(entries)) or 'none'}"
        )
    own = list_built(f"chatreid_stage{stage}", entries)
    named = [name for name in recipe.data.dataset or () if name in entries]
    if own:
        return f"{remedy}; or train on what is there: dataset={','.join(dict.fromkeys([*own, *named]))}"
    if stage == 1 and any(reasons.values()):
        return f"{remedy}; or leave Stage 1 out: Stage 2 starts without it with chatreid_encoder=null"
    return remedy


def check_starting_points(recipe: Recipe) -> list[Finding]:
    """Look for the folders or hub names that training starts from; a resumed Stage 2 has its own copy of them."""
    output = Path(recipe.training.output_dir)
    if recipe.training.resume_from_checkpoint and (output / COMPOSED_FOLDER / MARKER).is_file():
        return []
    return [
        Finding(key, "error", f"{key}: {name} {reason}", advise_start(key, recipe))
        for key, name in list_checkpoints(recipe).items()
        if (reason := find_absence(name, recipe.model)) is not None
    ]


def find_absence(name: str, model_args: Any) -> str | None:
    """Return why a checkpoint cannot be had, None if it can be."""
    if Path(name).is_dir():
        return None
    if not is_hub_name(name):
        return "is not a folder"
    if any(os.environ.get(variable) for variable in ("USE_MODELSCOPE_HUB", "USE_OPENMIND_HUB")):
        return None  # LLaMA-Factory's to fetch
    if find_model_folder(name, model_args) is not None:
        return None
    return _try_hub(name, model_args)


def _try_hub(name: str, model_args: Any) -> str | None:
    """Ask the hub for the smallest file of a model; the rest is fetched by whoever reads it."""
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(
            name,
            "config.json",
            revision=model_args.model_revision,
            cache_dir=model_args.cache_dir,
            token=model_args.hf_hub_token,
        )
    except (OSError, ValueError) as error:  # the hub's own errors are kinds of these
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return f"is neither a folder nor to be had from the Hugging Face hub ({first.rstrip('.')})"
    return None
