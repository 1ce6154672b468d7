"""YAML files and key=value overrides become checked settings; unknown keys are refused, all faults shown at once."""

import os
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, cast, get_args, get_origin
from urllib.parse import urlsplit

import yaml
from omegaconf import OmegaConf
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from .errors import ConfigError
from .tasks import LETTERS, TASKS, check_wording, list_stage_tasks
from .yaml_files import YAML_DAMAGE, name_fault, read_yaml


Share = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
# In what a match of the same person differs from the query: in nothing that it has to (``any``), in the camera
# (standard Re-ID), in camera and clothes (cloth-changing), in the modality (visible-infrared). The first three are of
# the query's modality.
Change = Literal["any", "camera", "clothes", "modality"]
# Readings of equation 1; `engine/sampler.py` says what each makes of the number of matches.
MatchLaw = Literal["uniform_overall", "inverse", "uniform"]


class Settings(BaseModel):
    """Base of every YAML model: unknown keys are errors, values cannot change afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
    # Keys that had other names, without the section they are in now, and the new ones.
    renamed: ClassVar[dict[str, str]] = {}

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        """Refuse paths that no JSON, Parquet or page can hold, before hours of work; texts pydantic refuses itself."""
        for key in type(self).model_fields:
            value: object = getattr(self, key)
            if isinstance(value, Path) and str(value).encode(errors="replace").decode() != str(value):
                raise ValueError(f"{key}: {str(value)!r} is no UTF-8. Rename the folder or file")
        return self


def raise_faults(faults: list[str]) -> None:
    """Raise one ValueError for all faults, as pydantic wants them from a validator."""
    if faults:
        raise ValueError("; ".join(faults))


class SourceSettings(Settings):
    """One raw data set: where it lies and which parser reads it (``chatreid list``; the name is the default).

    ``variant`` chooses a form of the data set (MSMT17 v1 or v2, CUHK03 detected or labelled, ...), ``trial`` one of
    its published train/test splits (RegDB 1 to 10, CUHK03 classic 1 to 20). ``stages`` are those it trains: none
    means that it is only tested, and kept out of training. Sources give records in proportion to their images, times
    ``weight``. ``change`` shares out in what the matches of the image-to-image tasks differ from the query, e.g.
    ``{camera: 0.5, clothes: 0.5}``; left out, it follows the data set's setting (``engine/executors.py``), and
    ``{any: 1}`` is for galleries of one camera. ``pattern`` belongs to the ``pattern`` parser, which reads any folder
    of crops, ``labels`` to the ``list`` parser, which reads a CSV or JSON Lines file (of a text-to-image set it names
    the label file, where several fit), and the keys after them to both; ``queries_per_person`` takes the place of
    ``query_cameras`` where cameras are unknown.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9]+$")]
    parser: str | None = None
    root: Path
    variant: str | None = None
    trial: Annotated[int, Field(ge=1)] = 1
    stages: tuple[Literal[1, 2, 3], ...] = (1, 2, 3)
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    change: dict[Change, Weight] = {}
    captions: Path | None = None
    allow_count_mismatch: bool = False
    unreadable: Literal["raise", "skip"] = "raise"
    pattern: str | None = None
    labels: Path | None = None
    train_share: Share = 0.5
    query_cameras: tuple[str, ...] = ()
    queries_per_person: Annotated[int, Field(ge=0)] = 0

    @property
    def parser_name(self) -> str:
        """The parser that reads it."""
        return self.parser or self.name


COLOUR = "colour"


class HardNegatives(Settings):
    """Other people who look like the query: what ``share`` of the negatives, and ``from`` what it is known.

    ``colour`` is the attribute ``upper_colour``. An .npz that ``chatreid embed`` wrote (``paths``, ``features``) knows
    it of images without attributes, too; where several sources train Stage 2 or 3, ``{source}`` in its name stands for
    the source's.
    """

    # The word is Python's own, so that the field cannot have the key's name.
    model_config = ConfigDict(populate_by_name=True)

    share: Share = 0.25
    looks: Annotated[str, Field(alias="from", pattern=rf"^{COLOUR}$|^.+\.npz$")] = COLOUR


def _read_share(value: object) -> object:
    """Take a plain number for the share."""
    return {"share": value} if isinstance(value, int | float) and not isinstance(value, bool) else value


class GallerySettings(Settings):
    """How galleries are drawn (paper section 3.2, equation 1).

    ``matches`` is the law of n, the number of matches; ``engine/sampler.py`` has its three readings.
    """

    min_size: Annotated[int, Field(ge=2, le=len(LETTERS))] = 2
    max_size: Annotated[int, Field(ge=2, le=len(LETTERS))] = 10
    # The one under which every number of matches is as frequent, the purpose that the paper states for equation 1.
    matches: MatchLaw = "uniform_overall"
    hard_negatives: Annotated[HardNegatives, BeforeValidator(_read_share)] = HardNegatives()

    @model_validator(mode="after")
    def _check_sizes(self) -> "GallerySettings":
        if self.min_size > self.max_size:
            raise ValueError(f"gallery.min_size {self.min_size} is above gallery.max_size {self.max_size}")
        return self


def _check_address(value: str) -> str:
    """Refuse an address whose host or port cannot be one, before a client meets it; ``{trial}`` is any number."""
    try:
        parts = urlsplit(value.replace("{trial}", "1"))
        host, port = parts.hostname or "", parts.port
        if ":" not in host:
            host.encode("idna")
    except ValueError as error:
        raise ValueError(f"{value!r} is no address: {error}. An IPv6 host stands in brackets, as [::1]:8000") from None
    if not host or port == 0:
        raise ValueError(f"{value!r} is no address such as http://127.0.0.1:8000/v1")
    return value


BaseUrl = Annotated[str, Field(pattern=r"^https?://[^\s/@?#]+(/[^\s@?#]*)?$"), AfterValidator(_check_address)]


class CaptioningSettings(Settings):
    """How captions and attributes are asked for (paper section 3.2), from any OpenAI-compatible endpoint.

    The key itself is never a setting: ``api_key_variable`` names the environment variable that holds it. Prices are
    for the estimate, ``max_failures`` is a share of the images asked for, ``timeout`` is in seconds. ``extra_body``
    adds keys to every request, e.g. ``{temperature: 0.7}``.
    """

    base_url: BaseUrl = "https://api.openai.com/v1"
    model: Annotated[str, Field(min_length=1)]
    api_key_variable: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = "OPENAI_API_KEY"
    concurrency: Annotated[int, Field(ge=1)] = 16
    requests_per_minute: Annotated[int, Field(ge=1)] | None = 500
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None
    price_per_million_input_tokens: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    price_per_million_output_tokens: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    max_failures: Share = 0.02
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    retries: Annotated[int, Field(ge=0)] = 6
    captions_per_image: Annotated[int, Field(ge=1, le=8)] = 1
    detail: Literal["low", "high"] = "low"
    extra_body: dict[str, Any] = {}


class QualitySettings(Settings):
    """Which training images are too poor to train with, and in which ``stages``; null switches a check off.

    The paper screens for Stage 1 alone, by size, resolution and blur, and gives no numbers (section 3.2): a caption of
    what can hardly be seen is made up. Aspect, brightness and copies are ours. Stages 2 and 3 ask about poor images,
    as benchmarks do.

    Sizes are in pixels, aspect is height over width, sharpness and brightness as in ``engine/image_facts.py``.
    ``near_duplicate_bits`` is how many of 256 bits the hash of a copy may differ in: 0 drops identical hashes only.

    The defaults drop what hardly shows a person, and none of 768 real and 3,300 synthetic crops they were tried on:
    those are 1.7 to 2.7 times as high as wide, their sharpness is 91 and more, their brightness 49 to 200, and two
    images of a person differ in 36 bits and more. Sharpness 3 is a crop drawn larger from 16 rows; copies that were
    scaled or saved again at JPEG quality 70 differ in up to 8 bits.
    """

    stages: Annotated[tuple[Literal[1, 2, 3], ...], Field(min_length=1)] = (1,)
    min_width: Annotated[int, Field(ge=1)] | None = 16
    min_height: Annotated[int, Field(ge=1)] | None = 32
    min_aspect: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 1.0
    max_aspect: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 5.0
    min_sharpness: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = 3.0
    min_brightness: Annotated[float, Field(ge=0, le=255)] | None = 15.0
    max_brightness: Annotated[float, Field(ge=0, le=255)] | None = 240.0
    near_duplicate_bits: Annotated[int, Field(ge=0, le=15)] | None = 8

    @model_validator(mode="after")
    def _check_ranges(self) -> "QualitySettings":
        ranges = {
            "aspect": (self.min_aspect, self.max_aspect),
            "brightness": (self.min_brightness, self.max_brightness),
        }
        raise_faults(
            [
                f"quality.min_{name} {least} is above quality.max_{name} {most}"
                for name, (least, most) in ranges.items()
                if least is not None and most is not None and least > most
            ]
        )
        return self


class BuildSettings(Settings):
    """The data engine's recipe: sources, how many records, in which shares."""

    sources: tuple[SourceSettings, ...]
    manifest_dir: Path = Path("manifests")
    output_dir: Path = Path("dataset_info")
    # How many of each stage; `chatreid parse` needs none.
    records: dict[Literal["stage1", "stage2", "stage3"], Annotated[int, Field(ge=1)]] = {}
    # Paper section 3.2: the two image-to-image tasks 25 to 30 % each, the other five about 10 % each. A task that
    # is not named here gets no records.
    stage2_ratios: dict[str, Weight] = {
        task.name: 0.25 if task.name.startswith("image_to_image") else 0.10 for task in list_stage_tasks(2)
    }
    # The paper gives no ratios of Stage 3. These are ours: what evaluation asks pair by pair is a fifth.
    stage3_ratios: dict[str, Weight] = {
        "standard_reid": 0.18,
        "cloth_changing_reid": 0.14,
        "visible_infrared_reid": 0.14,
        "text_to_image_reid": 0.14,
        "attribute_retrieval": 0.08,
        "multimodal_retrieval": 0.08,
        "dialogue_retrieval": 0.04,
        "image_to_image_one_to_one": 0.10,
        "text_to_image_one_to_one": 0.05,
        "attribute_one_to_one": 0.025,
        "multimodal_one_to_one": 0.025,
    }
    # Identities of each source that train no record; theirs are in data sets of their own, named ..._val.
    validation_share: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    gallery: GallerySettings = GallerySettings()
    captioning: CaptioningSettings | None = None
    quality: QualitySettings | None = QualitySettings()
    # Manifests whose query and gallery images must not be trained on either, beside those of the sources.
    audit_against: tuple[Path, ...] = ()
    # Bits of 256 in which the hash of the same image may differ; engine/screening/audit.py says why 14.
    audit_bits: Annotated[int, Field(ge=0, le=15)] = 14
    leaks: Literal["refuse", "drop", "allow"] = "refuse"
    prompt_variants: Annotated[int, Field(ge=1)] = 3
    # The user's wordings, task by task, besides those of the task table.
    prompts: dict[str, tuple[str, ...]] = {}
    cutoff_len: Annotated[int, Field(ge=64)] = 2048
    records_per_shard: Annotated[int, Field(ge=1)] = 20000
    seed: Annotated[int, Field(ge=0)] = 0
    # local: a process pool on this machine; ray: a Ray cluster that shares this folder.
    executor: Literal["local", "ray"] = "local"
    workers: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _check_sources_and_ratios(self) -> "BuildSettings":
        # Not a minimum length of the field: pydantic counts valid sources only and would call a wrong one missing.
        faults = [] if self.sources else ["sources is empty; name at least one data set"]
        names = [source.name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            faults.append(f"sources named twice: {', '.join(twice)}; each needs a name of its own")
        for stage, ratios in ((2, self.stage2_ratios), (3, self.stage3_ratios)):
            known = [task.name for task in list_stage_tasks(stage)]
            unknown = [name for name in ratios if name not in known]
            if unknown:
                wrong = f"stage{stage}_ratios names unknown task(s) {', '.join(unknown)}"
                faults.append(f"{wrong}; Stage {stage} has {', '.join(known)}")
            if not sum(ratios.values()) > 0:
                faults.append(f"stage{stage}_ratios are all zero")
        faults += self._find_faults_of_features()
        for name, wordings in self.prompts.items():
            if name not in TASKS:
                faults.append(f"prompts names the unknown task {name}; known tasks: {', '.join(TASKS)}")
            else:
                faults += filter(None, (check_wording(TASKS[name], wording) for wording in wordings))
        raise_faults(faults)
        return self

    def _find_faults_of_features(self) -> list[str]:
        """Refuse one file of features for several sources: their paths may be the same."""
        looks, shown = self.gallery.hard_negatives.looks, [s.name for s in self.sources if {2, 3} & set(s.stages)]
        if looks == COLOUR or "{source}" in looks or len(shown) < 2:
            return []
        return [
            f"gallery.hard_negatives.from is one file, {looks}, for {', '.join(shown)}; each source needs its own: "
            "write {source} in the name, e.g. features/{source}.npz"
        ]

    def count_workers(self) -> int:
        """Return how many processes to use: ``workers``, or the cores this process may run on."""
        return self.workers or len(os.sched_getaffinity(0))


SettingsType = TypeVar("SettingsType", bound=Settings)


def load_settings(path: Path, overrides: Sequence[str], model: type[SettingsType]) -> SettingsType:
    """Read a YAML file, apply ``key=value`` overrides (dots for nested keys) and check everything.

    Raises:
        ConfigError: the file cannot be read, or one or more keys are unknown or wrong; all faults are listed.
    """
    return check_settings(read_yaml(path), overrides, model, str(path))


def check_settings(values: Any, overrides: Sequence[str], model: type[SettingsType], source: str) -> SettingsType:
    """Apply ``key=value`` overrides to values and check everything.

    Args:
        values: a mapping, or what OmegaConf makes of one.
        overrides: dots for nested keys.
        model: the settings' class.
        source: where the values come from, for messages.

    Raises:
        ConfigError: one or more keys are unknown or wrong; all faults are listed.
    """
    wrong = [override for override in overrides if not override.partition("=")[0] or "=" not in override]
    if wrong:
        raise ConfigError(f"Overrides are written key=value; found {', '.join(wrong)}.")
    try:
        changes = [(key, yaml.safe_load(text)) for key, _, text in (item.partition("=") for item in overrides)]
        merged = OmegaConf.create(values)
        given = OmegaConf.to_container(merged)
        _refuse_flat_keys([*given.items(), *changes] if isinstance(given, dict) else changes, model, source)
        for key, value in changes:
            OmegaConf.update(merged, key, value)  # unlike a merge, it reaches into lists
        _refuse_environment(OmegaConf.to_container(merged), source)
        checked = OmegaConf.to_container(merged, resolve=True)
    except YAML_DAMAGE as error:
        raise ConfigError(f"{source} and the overrides cannot be read as YAML: {name_fault(error)}") from None
    try:
        return model.model_validate(checked)
    except ValidationError as error:
        found = error.errors()
        lines = [f"{source} has {len(found)} fault(s):", *(f"  {_describe_fault(fault, model)}" for fault in found)]
        known = {_find_container(fault, model) for fault in found}
        lines += [f"Known keys{place and f' of {place}'}: {', '.join(fields)}." for place, fields in sorted(known)]
        raise ConfigError("\n".join(lines)) from None


def list_sections(model: type[BaseModel]) -> dict[str, type[Settings]]:
    """Return the keys of a model that have keys of their own, with the models of these."""
    sections: dict[str, type[Settings]] = {}
    for name, field in model.model_fields.items():
        kind: Any = field.annotation
        kinds = get_args(kind) if get_origin(kind) is UnionType else (kind,)
        for one in kinds:
            if isinstance(one, type) and issubclass(one, Settings):
                sections[name] = one
    return sections


def _refuse_flat_keys(given: Sequence[tuple[Any, Any]], model: type[Settings], source: str) -> None:
    """Refuse keys without the section they are in, and say where they are: files once had no sections.

    Raises:
        ConfigError: names all of them.
    """
    sections = list_sections(model)
    faults: list[str] = []
    for key, value in given:
        inside = [f"{name}.{key}" for name, section in sections.items() if key in section.model_fields]
        new = model.renamed.get(key) or " or ".join(inside)
        is_section = key in sections and (isinstance(value, dict) or not model.renamed.get(key))
        if new and not is_section and (key in sections or key not in model.model_fields):
            faults.append(f"  {key}: write {new}")
    if faults:
        raise ConfigError("\n".join([f"{source} has {len(faults)} key(s) without a section:", *dict.fromkeys(faults)]))


def _find_container(fault: Any, model: type[Settings]) -> tuple[str, tuple[str, ...]]:
    """Return the section in which a fault lies, "" of the whole, and the section's keys."""
    first, *rest = fault["loc"] or ("",)
    section = list_sections(model).get(str(first))
    return (str(first), tuple(section.model_fields)) if section and rest else ("", tuple(model.model_fields))


def _builds_a_name(text: str) -> bool:
    """Return whether OmegaConf would call a function whose name another value gives: ``${oc.${kind}:NAME}``."""
    while not re.search(r"\$\{[^{}:]*\0[^{}:]*:", text):
        shorter = re.sub(r"\$?\{[^{}]*\}", "\0", text)
        if shorter == text:
            return False
        text = shorter
    return True


def _refuse_environment(value: Any, source: str, place: str = "") -> None:
    """Refuse ``${oc.env:NAME}``: settings are written into the provenance of what is made, and keys are no part of it.

    Raises:
        ConfigError: names the setting.
    """
    if isinstance(value, str) and ("oc.env" in value or _builds_a_name(value)):
        raise ConfigError(
            f"{source}: {place} takes a value of the environment, which would be written into the provenance of what "
            f'is made. Leave it out of the file and give it as an override, {place}="$NAME"; a server\'s key is named '
            "by api_key_variable."
        )
    if isinstance(value, dict):
        parts: list[tuple[Any, Any]] = list(cast(dict[Any, Any], value).items())
    else:
        parts = list(enumerate(cast(list[Any], value))) if isinstance(value, list) else []
    for name, part in parts:
        _refuse_environment(part, source, f"{place}.{name}" if place else str(name))


def _describe_fault(fault: Any, model: type[Settings]) -> str:
    """Return ``key: what is wrong``; a fault of several keys names them itself."""
    place = ".".join(str(part) for part in fault["loc"])
    message: str = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        message = "unknown key" + _suggest(fault["loc"], model)
    elif fault["type"] == "missing":
        message = "this key is missing"
    elif fault["type"] == "string_pattern_mismatch" and place.endswith("base_url"):
        message = f"{fault['input']!r} is no address such as http://127.0.0.1:8000/v1"
    return message if not place or message.startswith(f"{place}.") else f"{place}: {message}"


def _suggest(place: tuple[int | str, ...], model: type[Settings]) -> str:
    """Return the known key that an unknown one is most like, as a question, or nothing."""
    *above, key = map(str, place)
    sections = list_sections(model)
    if above and (len(above) > 1 or above[0] not in sections):
        return ""
    known = {name: f"{part}.{name}" for part, section in sections.items() for name in section.model_fields}
    known |= {**model.renamed, **{name: name for name in model.model_fields}}
    if above:
        # A key of its own section is likelier meant than the same key of another one.
        known |= {name: f"{above[0]}.{name}" for name in sections[above[0]].model_fields}
    near = get_close_matches(key, list(known), 1)
    return f"; did you mean {known[near[0]]}?" if near else ""
