"""Checks of the data sets that a recipe names: entered, complete, readable, images present, no record too long.

LLaMA-Factory says "Undefined dataset" below a traceback, after a minute of imports.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..answers import render_turns
from ..errors import ChatReIDError
from ..images import ImagePolicy, PatchGeometry, count_visual_tokens
from ..records import ADDED_COLUMNS, INSTRUCTION_SCHEMA, Instruction, convert_row_to_instruction
from ..shards import DATASET_INFO, FORMATTING, LEFT_OUT, check_shard, read_json, read_shard
from ..tasks import IMAGE_MARK, format_chat_prompt
from ..upstream import get_upstream
from .dataset_info import (
    STAGE_NAME,
    check_dataset_files,
    find_image_root,
    find_own_prompts,
    is_local,
    list_built,
)
from .images import read_size
from .recipe import Finding, Recipe
from .recipe_model import find_model_folder
from .trainer import find_prompt


SAMPLED_RECORDS = 200
# A shard is read whole; of hundreds, these many evenly spread ones are.
SAMPLED_SHARDS = 20
# Records of each data set whose image files are looked for.
RECORDS_WITH_IMAGES = 20
# English prose takes 4 to 5 characters a token; attribute lists fewer.
CHARACTERS_PER_TOKEN = 3


@dataclass(frozen=True, slots=True)
class Sample:
    """Some records of a data set, evenly spread, with what is needed to render them."""

    name: str
    total: int
    records: list[Instruction]
    image_root: str
    own_prompts: tuple[str, ...]


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
    if not STAGE_NAME.fullmatch(name):
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


def check_datasets(recipe: Recipe) -> list[Finding]:
    """Check every data set of ``dataset`` and ``eval_dataset``; reads some records of each."""
    data = recipe.data
    if not is_local(data.dataset_dir):
        return [Finding("data", "warning", f"dataset_dir {data.dataset_dir} is not looked at")]
    findings = check_dataset_names(recipe)
    if not (Path(data.dataset_dir) / DATASET_INFO).is_file():
        return findings
    entries = read_json(Path(data.dataset_dir) / DATASET_INFO)
    names = [name for name in dict.fromkeys([*(data.dataset or ()), *(data.eval_dataset or ())]) if name in entries]
    count = find_token_counter(recipe)
    for name in names:
        try:
            findings += _check_dataset(name, recipe, count)
        except ChatReIDError as error:
            findings.append(Finding(f"data {name}", "error", str(error)))
    return findings


def _check_dataset(name: str, recipe: Recipe, count: Callable[[Sample, Instruction], int]) -> list[Finding]:
    import llamafactory.data.parser as module

    check = f"data {name}"
    attributes = get_upstream(module, "get_dataset_list")([name], recipe.data.dataset_dir)[0]
    if attributes.formatting != FORMATTING or attributes.load_from != "file":
        if recipe.data.chatreid_lazy:
            found = f"formatting {attributes.formatting}, which chatreid_lazy cannot read"
            return [Finding(check, "error", found, "Set chatreid_lazy: false to mix data sets")]
        return [Finding(check, "ok", f"formatting {attributes.formatting}: not looked at")]
    check_dataset_files(attributes, recipe.data)
    sample = draw_sample(attributes, recipe.data)
    if not sample.records:
        return [Finding(check, "warning", "no Parquet shards: records not looked at", "`chatreid build` writes them")]
    longest = max(sample.records, key=lambda record: count(sample, record))
    found = f"{sample.total} record(s), {len(sample.records)} read"
    return [
        Finding(check, "ok", found),
        check_images(sample),
        check_length(sample, longest, count(sample, longest), recipe),
    ]


def spread(total: int, count: int) -> list[int]:
    """Return up to ``count`` positions below ``total``, evenly spread, with the first and the last."""
    if total <= count:
        return list(range(total))
    return [position * (total - 1) // (count - 1) for position in range(count)]


def draw_sample(attributes: Any, data_args: Any) -> Sample:
    """Read evenly spread records of a data set's shards; none if it has no Parquet shards.

    Raises:
        DataError: a shard or a record cannot be read.
    """
    path = Path(data_args.dataset_dir) / attributes.dataset_name
    shards = sorted(path.glob("*.parquet")) if path.is_dir() else [path] if path.suffix == ".parquet" else []
    shards = [shard for shard in shards if check_shard(shard)]
    total = sum(map(check_shard, shards))
    chosen = [shards[position] for position in spread(len(shards), SAMPLED_SHARDS)]
    records: list[Instruction] = []
    for shard in chosen:
        table = read_shard(shard, INSTRUCTION_SCHEMA, ADDED_COLUMNS)
        rows = table.take(spread(table.num_rows, -(-SAMPLED_RECORDS // len(chosen)))).to_pylist()
        records += map(convert_row_to_instruction, rows)
    root, prompts = find_image_root(attributes, data_args), find_own_prompts(attributes)
    return Sample(str(attributes.dataset_name), total, records, root, prompts)


def check_images(sample: Sample) -> Finding:
    """Look for the image files of some records."""
    records = [sample.records[position] for position in spread(len(sample.records), RECORDS_WITH_IMAGES)]
    paths = [os.path.join(sample.image_root, image.path) for record in records for image in record.images]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        found = f"{len(missing)} of {len(paths)} image(s) do not exist, first {missing[0]}"
        return Finding(f"images {sample.name}", "error", found, "Set media_dir to the folder where the images are")
    return Finding(f"images {sample.name}", "ok", f"{len(paths)} found in {sample.image_root}")


def check_length(sample: Sample, longest: Instruction, tokens: int, recipe: Recipe) -> Finding:
    """Compare the longest record with ``cutoff_len``: stock LLaMA-Factory cuts image tokens, and training stops."""
    found = f"longest record of {len(sample.records)} read has {tokens} tokens, cutoff_len is {recipe.cutoff_len}"
    if tokens > recipe.cutoff_len:
        found += f" (record {longest.id})"
        advice = f"Set cutoff_len: {-(-tokens // 8) * 8} or build with smaller galleries"
        if recipe.data.chatreid_over_cutoff == "trim":
            return Finding(f"length {sample.name}", "warning", f"{found}: its gallery will be trimmed", advice)
        return Finding(f"length {sample.name}", "error", found, advice)
    return Finding(f"length {sample.name}", "ok", found)


def find_token_counter(recipe: Recipe) -> Callable[[Sample, Instruction], int]:
    """Return a function that counts a record's tokens, with the model's own tokenizer if its files are here."""
    try:
        folder = find_model_folder(recipe.model.model_name_or_path, recipe.model)
    except ChatReIDError:  # reported by check_checkpoints
        folder = None
    geometry = PatchGeometry() if folder is None else read_patch_geometry(folder)
    tokenizer: Any = None
    if folder is not None and (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    limits = recipe.model.image_max_pixels, recipe.model.image_min_pixels
    policy = ImagePolicy(recipe.data.chatreid_stage, recipe.data.chatreid_aspect, *limits)

    system = find_prompt(recipe.data)

    def count(sample: Sample, record: Instruction) -> int:
        # As LLaMA-Factory's template qwen2_vl writes a conversation; the system prompt stands before the first turn.
        text = "".join(
            f"{format_chat_prompt(prompt, system='' if number else system)}{answer}<|im_end|>\n"
            for number, (prompt, answer) in enumerate(render_turns(record, sample.own_prompts))
        ).replace(IMAGE_MARK, "<|vision_start|><|vision_end|>")
        words = len(text) // CHARACTERS_PER_TOKEN if tokenizer is None else len(tokenizer.encode(text).ids)
        images = (
            {"path": os.path.join(sample.image_root, i.path), "width": i.width, "height": i.height}
            for i in record.images
        )
        return words + sum(count_visual_tokens(*read_size(image), policy, geometry) for image in images)

    return count


def read_patch_geometry(folder: Path) -> PatchGeometry:
    """Return the image processor's numbers from a checkpoint folder; Qwen2-VL's where it does not say.

    transformers 5 writes them into processor_config.json, earlier versions into preprocessor_config.json.
    """
    values: dict[str, Any] = {}
    if (folder / "preprocessor_config.json").is_file():
        values = read_json(folder / "preprocessor_config.json")
    elif (folder / "processor_config.json").is_file():
        values = read_json(folder / "processor_config.json").get("image_processor") or {}
    stock = PatchGeometry()
    size = values.get("size") or {}
    return PatchGeometry(
        values.get("patch_size") or stock.patch_size,
        values.get("merge_size") or stock.merge_size,
        size.get("shortest_edge") or values.get("min_pixels") or stock.min_pixels,
        size.get("longest_edge") or values.get("max_pixels") or stock.max_pixels,
    )
