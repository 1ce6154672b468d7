"""The settings of an evaluation, a section for each part of it; every file in ``eval/`` is checked against them."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import Field, field_validator, model_validator

from ..config import BaseUrl, Settings, Share, Weight, raise_faults
from ..datasets.registry import list_benchmarks
from ..images import DEFAULT_IMAGE_MAX_PIXELS, DEFAULT_IMAGE_MIN_PIXELS, Aspect, ImagePolicy
from ..tasks import LETTERS, TASKS


class DataSettings(Settings):
    """``data``: what is measured, and by which of the benchmark's readings."""

    benchmark: str
    manifest: Path
    image_root: Path | None = None
    # The form of the data set that the manifest must have.
    variant: str | None = None
    # How the benchmark is run, where it can be run in several ways.
    setting: str | None = None
    shots: Literal["single", "multi"] | None = None
    restrict: bool = False
    attributes: tuple[str, ...] = ()
    trials: Annotated[int, Field(ge=1)] = 10
    trials_from: Literal["published", "agw_seed"] | None = None
    # With {trial} in `manifest` (and in any other path or name): the splits whose mean is taken.
    splits: tuple[Annotated[int, Field(ge=1)], ...] = ()
    # top500 takes equal scores in gallery order; the others over all their orders.
    average_precision: Literal["mean", "trapezoid", "top500"] = "mean"
    camera_rule: bool = True
    # Whether gallery images that are the query's own file, byte for byte, are ignored.
    ignore_copies: bool = False
    max_queries: Annotated[int, Field(ge=1)] | None = None
    # Of the galleries of `shots: single` of PRCC, and of the training images that `filter.tau: auto` looks at.
    seed: Annotated[int, Field(ge=0)] = 0

    @field_validator("benchmark")
    @classmethod
    def _check_benchmark(cls, name: str) -> str:
        known = list_benchmarks()
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"{name!r} is no benchmark; {hint}known: {', '.join(known)}")
        return name

    @model_validator(mode="after")
    def _check_choices(self) -> Self:
        faults: list[str] = []
        for key in ("setting", "shots", "restrict", "trials_from", "variant"):
            value, allowed = getattr(self, key), self.choices.get(key, ())
            if value not in (None, False) and value not in allowed:
                wanted = f"choose one of {', '.join(map(str, allowed))}" if allowed else "it has none"
                faults.append(f"data.{key}: {value} does not fit benchmark {self.benchmark}; {wanted}")
        if bool(self.splits) != ("{trial}" in str(self.manifest)):
            faults.append("data.splits and {trial} in data.manifest belong together; set both or neither")
        raise_faults(faults)
        return self

    @property
    def choices(self) -> Mapping[str, tuple[Any, ...]]:
        """The keys that only some benchmarks have, with the values of this one; null is the first of them."""
        return list_benchmarks()[self.benchmark].choices

    def choose(self, key: str) -> Any:
        """Return the value of a key of ``choices``, or what null stands for."""
        value = getattr(self, key)
        return self.choices.get(key, (value,))[0] if value is None else value


class ModelSettings(Settings):
    """``model``: a checkpoint, where it runs, and the images as it was trained with them; all that ``serve`` needs."""

    model_name_or_path: str | None = None
    adapter_name_or_path: str | None = None
    # null: the one that is recorded with the checkpoint, else its family's own; "" for none.
    system_prompt: str | None = None
    chatreid_stage: Literal[1, 2, 3] | None = 3
    chatreid_aspect: Aspect = "stretch"
    image_max_pixels: Annotated[int, Field(ge=784)] = DEFAULT_IMAGE_MAX_PIXELS
    image_min_pixels: Annotated[int, Field(ge=1)] = DEFAULT_IMAGE_MIN_PIXELS
    batch_size: Annotated[int, Field(ge=1)] = 128
    features_on: Literal["device", "host"] = "device"
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    @property
    def policy(self) -> ImagePolicy:
        """The image policy the model was trained with."""
        return ImagePolicy(self.chatreid_stage, self.chatreid_aspect, self.image_max_pixels, self.image_min_pixels)

    @property
    def title(self) -> str:
        """The checkpoint and its adapter, for people."""
        return " + ".join(name for name in (self.model_name_or_path, self.adapter_name_or_path) if name)


class ServerSettings(Settings):
    """``server``: where the model is asked with ``scoring.backend: http``."""

    base_url: BaseUrl = "http://127.0.0.1:8000/v1"
    model: Annotated[str, Field(min_length=1)] | None = None
    api_key_variable: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = "CHATREID_API_KEY"
    concurrency: Annotated[int, Field(ge=1)] = 16
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    retries: Annotated[int, Field(ge=0)] = 6
    votes: Annotated[int, Field(ge=1, le=64)] = 1
    extra_body: dict[str, Any] = {}


class FilterSettings(Settings):
    """``filter``: the baseline, and how many of its most similar images the model is asked about."""

    # Of the sources that need neither a file nor a choice the model's own features are the only ones that cross
    # modality and clothes. EvalSettings knows benchmarks that need another one.
    source: Literal["none", "colour", "npz", "torchvision", "timm", "clip", "vlm"] = "vlm"
    features: Path | None = None
    weights: Path | None = None
    model: str | None = None
    # auto: so that `recall` of the training identities' matches reach it (`eval/calibration.py`).
    tau: Literal["auto"] | Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)] = "auto"
    recall: Annotated[float, Field(gt=0, le=1)] = 0.99
    top_k: Annotated[int, Field(ge=1)] | None = 100
    floor: Annotated[int, Field(ge=0)] = 20

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        needed = {
            "npz": {"features": "an .npz file with `paths` and `features`"},
            "torchvision": {"weights": "a ResNet-50 state_dict file"},
            "timm": {"model": "a timm name", "weights": "its state_dict file"},
            "clip": {"model": "a folder with a CLIP or SigLIP model"},
        }.get(self.source, {})
        if any(getattr(self, key) is None for key in needed):
            keys = " and ".join(f"filter.{key} ({what})" for key, what in needed.items())
            raise ValueError(f"filter.source: {self.source} needs {keys}")
        return self


class ScoringSettings(Settings):
    """``scoring``: who scores the candidates, how the model is asked, and what its scores are fused with."""

    backend: Literal["transformers", "http", "features", "scores", "random", "oracle"] = "transformers"
    # another model's output, for backend: features and backend: scores
    features: Path | None = None
    scores: Path | None = None
    mode: Literal["pointwise", "choice", "turns"] = "pointwise"
    window: Annotated[int, Field(ge=2, le=len(LETTERS))] = 10
    shifts: Annotated[int, Field(ge=1, le=len(LETTERS))] = 1
    choice_task: str | None = None
    # None: a query of image and text is one question; else two, the text's this many times. Attributes are always two.
    text_weight: Weight | None = None
    image_order: Literal["query_first", "gallery_first", "both"] = "query_first"
    # Rank the scores in output_dir; no model is loaded. How a run came by its results is no part of results.json.
    saved_scores: Annotated[bool, Field(exclude=True)] = False
    # fusion with the baseline, after the scores are saved
    fusion: Literal["none", "linear", "reciprocal_rank", "k_reciprocal"] = "none"
    fusion_weight: Share = 0.5
    k1: Annotated[int, Field(ge=1)] = 20
    k2: Annotated[int, Field(ge=1)] = 6
    lambda_value: Share = 0.3
    # Of the windows of `mode: choice` and `turns`, and of `backend: random`.
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _check_files_and_task(self) -> Self:
        faults: list[str] = []
        if self.backend == "scores" and self.scores is None:
            faults.append(
                "scoring.backend: scores needs scoring.scores (an .npz file with `scores`, `queries` and `gallery`)"
            )
        for key in ("features", "scores"):
            if getattr(self, key) is not None and self.backend != key:
                faults.append(
                    f"scoring.{key} is for backend: {key}, not {self.backend}; set scoring.backend={key} or remove it"
                )
        if self.reads_scores and self.fusion != "none":
            faults.append(
                f"scoring.fusion: {self.fusion} fuses with a filter's features, but a file's {self.backend} are not "
                "filtered; set scoring.fusion=none, or scoring.backend=features filter.source=npz "
                "filter.features=FILE.npz"
            )
        if self.saved_scores and not self.asks_model:
            faults.append(
                f"scoring.saved_scores: backend: {self.backend} loads no model anyway; remove scoring.saved_scores"
            )
        letter_tasks = [name for name, task in TASKS.items() if task.answer_kind == "letters"]
        if self.choice_task is not None and self.choice_task not in letter_tasks:
            faults.append(f"scoring.choice_task: {self.choice_task} is none of {', '.join(letter_tasks)}")
        raise_faults(faults)
        return self

    @property
    def asks_model(self) -> bool:
        """Whether a model is shown the images and asked about them, here or behind a server."""
        return self.backend in ("transformers", "http")

    @property
    def reads_scores(self) -> bool:
        """Whether every pair's score comes from a file, so that no image is opened and nothing is filtered."""
        return self.backend == "scores" or (self.backend == "features" and self.features is not None)


class OutputSettings(Settings):
    """``output``: where the results go, and what is written."""

    output_dir: Path
    # Who scored, in the table, the page and the rows of `chatreid report`; null: the checkpoint, server or file.
    name: Annotated[str, Field(min_length=1)] | None = None
    report_queries: Annotated[int, Field(ge=0)] = 50
    # Write every pair's score into this .npz or .npy file as well (`eval/backends/files.py`).
    save_matrix: Annotated[Path | None, Field(exclude=True)] = None
    overwrite: Annotated[bool, Field(exclude=True)] = False


class ModelOnly(Settings):
    """The keys of `chatreid serve` and `chatreid embed`: those of an evaluation's section ``model``."""

    model: ModelSettings


class RankSettings(Settings):
    """The keys of `chatreid search`: who ranks a query's candidates, and how."""

    model: ModelSettings = ModelSettings()
    server: ServerSettings = ServerSettings()
    filter: FilterSettings = FilterSettings()
    scoring: ScoringSettings = ScoringSettings()

    @model_validator(mode="after")
    def _check_sections(self) -> Self:
        raise_faults(self._list_faults())
        return self

    def _list_faults(self) -> list[str]:
        """Return what in one section does not go with another."""
        faults: list[str] = []
        scoring, source = self.scoring, self.filter.source
        if scoring.backend == "transformers" and not self.model.model_name_or_path:
            faults.append(
                "scoring.backend: transformers needs model.model_name_or_path (a checkpoint folder or hub name)"
            )
        if source == "vlm" and scoring.backend != "transformers" and not scoring.reads_scores:
            faults.append(
                f"filter.source: vlm needs the model itself, which scoring.backend: {scoring.backend} does not load; "
                "set filter.source=npz filter.features=FILE.npz (of `chatreid embed`), filter.source=colour or "
                "filter.source=none"
            )
        if scoring.fusion != "none" and source == "none":
            faults.append(
                f"scoring.fusion: {scoring.fusion} fuses with the filter's features, so filter.source must not be none"
            )
        if scoring.backend == "features" and source == "none" and scoring.features is None:
            faults.append(
                "scoring.backend: features needs scoring.features (an .npz file), or ranks by the filter's, so "
                "filter.source must not be none"
            )
        if scoring.image_order != "query_first" and (why := self._find_fixed_order()):
            faults.append(f"scoring.image_order: {scoring.image_order} does not apply: {why}; remove it")
        return faults

    def _find_fixed_order(self) -> str:
        """Return why questions have one order of images only, or nothing."""
        if self.scoring.backend == "http":
            return "a server is asked query_first only"
        return "" if self.scoring.mode == "pointwise" else f"mode: {self.scoring.mode} shows the query first"

    @property
    def opens_images(self) -> bool:
        """Whether a model or the filter looks at images; else they are but pictures of the report."""
        scoring = self.scoring
        return scoring.asks_model or not (scoring.reads_scores or self.filter.source in ("none", "npz"))


class EvalSettings(RankSettings):
    """One evaluation: what is measured, who ranks, where the results go."""

    data: DataSettings
    output: OutputSettings

    # Where the keys of files without sections went; those that are not here kept their name (``find_new_name``).
    renamed: ClassVar[dict[str, str]] = {
        "protocol": "data.benchmark",
        "filter": "filter.source",
        "filter_features": "filter.features",
        "filter_weights": "filter.weights",
        "filter_model": "filter.model",
        "filter_recall": "filter.recall",
        "features": "scoring.features",
        "model": "server.model",
        "seed": "data.seed and scoring.seed",
    }

    @model_validator(mode="before")
    @classmethod
    def _fill_filter(cls, values: Any) -> Any:
        """Give the filter what the benchmark needs, where the keys say nothing else.

        Words are compared by few sources, and galleries of one image a person are small enough to be scored whole.
        """
        sections: list[Any] = [values.get("data"), values.get("filter", {})] if isinstance(values, dict) else [None]
        if not all(isinstance(section, dict) for section in sections):
            return values
        data, chosen = cast(list[dict[str, Any]], sections)
        rules = list_benchmarks().get(str(data.get("benchmark")))
        if rules is None:
            return values
        shots = data.get("shots") or rules.choices.get("shots", ("",))[0]
        own: dict[str, Any] = {"source": "none"} if rules.asks_in_words or shots == "single" else {}
        own |= {"top_k": rules.top_k}
        return {**cast(dict[str, Any], values), "filter": own | chosen}

    def _list_faults(self) -> list[str]:
        faults, scoring, output = super()._list_faults(), self.scoring, self.output
        if self.data.setting == "image_to_text" and scoring.mode != "pointwise":
            faults.append(
                f"data.setting: image_to_text ranks captions, and scoring.mode: {scoring.mode} shows images; set "
                "pointwise"
            )
        if scoring.saved_scores and output.overwrite:
            faults.append("scoring.saved_scores: output.overwrite removes the saved scores; set one of the two")
        return faults + self._list_save_matrix_faults()

    def _find_fixed_order(self) -> str:
        words = list_benchmarks()[self.data.benchmark].asks_in_words
        return super()._find_fixed_order() or (f"{self.data.benchmark} asks in words" if words else "")

    def _list_save_matrix_faults(self) -> list[str]:
        """Return why the scores cannot be written into ``save_matrix``."""
        file, faults = self.output.save_matrix, list[str]()
        if file is None:
            return faults
        if file.suffix not in (".npz", ".npy"):
            faults.append(f"output.save_matrix: {file} has to end in .npz, or in .npy for scores that can be mapped")
        if self.scoring.backend == "scores":
            faults.append("output.save_matrix: scoring.backend: scores has its scores in a file already; remove it")
        if file.with_suffix(".npz") in (self.scoring.features, self.filter.features):
            faults.append(f"output.save_matrix: {file} would overwrite the features; name another file")
        if self.data.splits and "{trial}" not in str(file):
            faults.append("output.save_matrix: with splits it needs {trial} in its name, a file for each")
        return faults

    def replace(self, **sections: dict[str, Any]) -> Self:
        """Return the settings with some keys of some sections changed, unchecked: ``replace(data={"trials": 1})``."""
        changed = {name: getattr(self, name).model_copy(update=keys) for name, keys in sections.items()}
        return self.model_copy(update=changed)
