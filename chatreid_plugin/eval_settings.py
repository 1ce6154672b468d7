"""The settings of one evaluation, as its YAML gives them; every file in ``eval/`` is checked against this class."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from .config import BaseUrl, Settings, raise_faults
from .datasets.registry import list_benchmarks
from .images import DEFAULT_IMAGE_MAX_PIXELS, DEFAULT_IMAGE_MIN_PIXELS, Aspect, ImagePolicy
from .tasks import LETTERS, TASKS


class EvalSettings(Settings):
    """One evaluation: data, filter, scorer, outputs."""

    # data
    protocol: str
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
    # model
    model_name_or_path: str | None = None
    adapter_name_or_path: str | None = None
    # null: the one that is recorded with the checkpoint, else its family's own; "" for none.
    system_prompt: str | None = None
    chatreid_stage: Literal[1, 2, 3] | None = 3
    chatreid_aspect: Aspect = "stretch"
    image_max_pixels: Annotated[int, Field(ge=784)] = DEFAULT_IMAGE_MAX_PIXELS
    image_min_pixels: Annotated[int, Field(ge=1)] = DEFAULT_IMAGE_MIN_PIXELS
    # filter
    # Of the sources that need neither a file nor a choice the model's own features are the only ones that cross
    # modality and clothes.
    filter: Literal["none", "colour", "npz", "torchvision", "timm", "clip", "vlm"] = "vlm"
    filter_features: Path | None = None
    filter_weights: Path | None = None
    filter_model: str | None = None
    # auto: so that `filter_recall` of the training identities' matches reach it (`eval/calibration.py`).
    tau: Literal["auto"] | Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)] = "auto"
    filter_recall: Annotated[float, Field(gt=0, le=1)] = 0.99
    top_k: Annotated[int, Field(ge=1)] | None = 100
    floor: Annotated[int, Field(ge=0)] = 20
    # scoring
    backend: Literal["transformers", "http", "features", "scores", "random", "oracle"] = "transformers"
    # another model's output, for backend: features and backend: scores
    features: Path | None = None
    scores: Path | None = None
    mode: Literal["pointwise", "choice", "turns"] = "pointwise"
    window: Annotated[int, Field(ge=2, le=len(LETTERS))] = 10
    shifts: Annotated[int, Field(ge=1, le=len(LETTERS))] = 1
    choice_task: str | None = None
    # None: a query of image and text is one question; else two, the text's this many times. Attributes are always two.
    text_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    # Write every pair's score into this .npz or .npy file as well (`eval/matrix_file.py`).
    save_matrix: Annotated[Path | None, Field(exclude=True)] = None
    # Rank the scores in output_dir; no model is loaded. How a run came by its results is no part of results.json.
    saved_scores: Annotated[bool, Field(exclude=True)] = False
    # fusion with the baseline, after the scores are saved
    fusion: Literal["none", "linear", "reciprocal_rank", "k_reciprocal"] = "none"
    fusion_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    k1: Annotated[int, Field(ge=1)] = 20
    k2: Annotated[int, Field(ge=1)] = 6
    lambda_value: Annotated[float, Field(ge=0, le=1)] = 0.3
    batch_size: Annotated[int, Field(ge=1)] = 128
    image_order: Literal["query_first", "gallery_first", "both"] = "query_first"
    features_on: Literal["device", "host"] = "device"
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    # server, for backend: http
    base_url: BaseUrl = "http://127.0.0.1:8000/v1"
    model: Annotated[str, Field(min_length=1)] | None = None
    api_key_variable: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = "CHATREID_API_KEY"
    concurrency: Annotated[int, Field(ge=1)] = 16
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    retries: Annotated[int, Field(ge=0)] = 6
    votes: Annotated[int, Field(ge=1, le=64)] = 1
    extra_body: dict[str, Any] = {}
    # output
    # Who scored, in the table, the page and the rows of `chatreid report`; null: the checkpoint, server or file.
    name: Annotated[str, Field(min_length=1)] | None = None
    output_dir: Path
    report_queries: Annotated[int, Field(ge=0)] = 50
    overwrite: Annotated[bool, Field(exclude=True)] = False
    seed: Annotated[int, Field(ge=0)] = 0

    @field_validator("protocol")
    @classmethod
    def _check_protocol(cls, name: str) -> str:
        known = list_benchmarks()
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"{name!r} is no benchmark; {hint}known: {', '.join(known)}")
        return name

    @model_validator(mode="after")
    def _check_needs(self) -> "EvalSettings":
        faults: list[str] = []
        if self.backend == "transformers" and not self.model_name_or_path:
            faults.append("backend: transformers needs model_name_or_path (a checkpoint folder or hub name)")
        faults += self._list_filter_faults()
        if self.fusion != "none" and self.filter == "none":
            faults.append(f"fusion: {self.fusion} fuses with the filter's features, so filter must not be none")
        faults += self._list_file_faults()
        faults += self._list_saved_scores_faults()
        faults += self._list_save_matrix_faults()
        letter_tasks = [name for name, task in TASKS.items() if task.answer_kind == "letters"]
        if self.choice_task is not None and self.choice_task not in letter_tasks:
            faults.append(f"choice_task: {self.choice_task} is none of {', '.join(letter_tasks)}")
        if self.image_order != "query_first" and (why := self._find_fixed_order()):
            faults.append(f"image_order: {self.image_order} does not apply: {why}; remove it")
        for key in ("setting", "shots", "restrict", "trials_from", "variant"):
            value, allowed = getattr(self, key), self.choices.get(key, ())
            if value not in (None, False) and value not in allowed:
                wanted = f"choose one of {', '.join(map(str, allowed))}" if allowed else "it has none"
                faults.append(f"{key}: {value} does not fit protocol {self.protocol}; {wanted}")
        if self.setting == "image_to_text" and self.mode != "pointwise":
            faults.append(f"setting: image_to_text ranks captions, and mode: {self.mode} shows images; set pointwise")
        if bool(self.splits) != ("{trial}" in str(self.manifest)):
            faults.append("splits and {trial} in the manifest's name belong together; set both or neither")
        raise_faults(faults)
        return self

    def _find_fixed_order(self) -> str:
        """Return why questions have one order of images only, or nothing."""
        if self.backend == "http":
            return "a server is asked query_first only"
        if self.mode != "pointwise":
            return f"mode: {self.mode} shows the query first"
        return f"{self.protocol} asks in words" if list_benchmarks()[self.protocol].asks_in_words else ""

    def _list_filter_faults(self) -> list[str]:
        """Return what the source of the filter's features lacks."""
        faults: list[str] = []
        if self.filter == "npz" and self.filter_features is None:
            faults.append("filter: npz needs filter_features (an .npz file with `paths` and `features`)")
        if self.filter == "torchvision" and self.filter_weights is None:
            faults.append("filter: torchvision needs filter_weights (a ResNet-50 state_dict file)")
        if self.filter == "timm" and (self.filter_model is None or self.filter_weights is None):
            faults.append("filter: timm needs filter_model (a timm name) and filter_weights (its state_dict file)")
        if self.filter == "clip" and self.filter_model is None:
            faults.append("filter: clip needs filter_model (a folder with a CLIP or SigLIP model)")
        if self.filter == "vlm" and self.backend != "transformers" and not self.reads_scores:
            faults.append(
                f"filter: vlm needs the model itself, which backend: {self.backend} does not load; set filter=npz "
                "filter_features=FILE.npz (of `chatreid embed`), filter=colour or filter=none"
            )
        return faults

    def _list_file_faults(self) -> list[str]:
        """Return what is wrong with the keys of another model's output."""
        faults: list[str] = []
        if self.backend == "features" and self.filter == "none" and self.features is None:
            faults.append(
                "backend: features needs features (an .npz file), or ranks by the filter's, so filter must not be none"
            )
        if self.backend == "scores" and self.scores is None:
            faults.append("backend: scores needs scores (an .npz file with `scores`, `queries` and `gallery`)")
        if self.reads_scores and self.fusion != "none":
            faults.append(
                f"fusion: {self.fusion} fuses with a filter's features, but a file's {self.backend} are not filtered; "
                "set fusion=none, or backend=features filter=npz filter_features=FILE.npz"
            )
        for key in ("features", "scores"):
            if getattr(self, key) is not None and self.backend != key:
                faults.append(f"{key} is for backend: {key}, not {self.backend}; set backend={key} or remove it")
        return faults

    def _list_saved_scores_faults(self) -> list[str]:
        """Return what does not go with ranking saved scores without the model."""
        faults: list[str] = []
        if not self.saved_scores:
            return faults
        if not self.asks_model:
            faults.append(f"saved_scores: backend: {self.backend} loads no model anyway; remove saved_scores")
        if self.overwrite:
            faults.append("saved_scores: overwrite removes the saved scores; set one of the two")
        return faults

    def _list_save_matrix_faults(self) -> list[str]:
        """Return why the scores cannot be written into ``save_matrix``."""
        file, faults = self.save_matrix, list[str]()
        if file is None:
            return faults
        if file.suffix not in (".npz", ".npy"):
            faults.append(f"save_matrix: {file} has to end in .npz, or in .npy for scores that can be mapped")
        if self.backend == "scores":
            faults.append("save_matrix: backend: scores has its scores in a file already; remove save_matrix")
        if file.with_suffix(".npz") in (self.features, self.filter_features):
            faults.append(f"save_matrix: {file} would overwrite the features; name another file")
        if self.splits and "{trial}" not in str(file):
            faults.append("save_matrix: with splits it needs {trial} in its name, a file for each")
        return faults

    @property
    def choices(self) -> Mapping[str, tuple[Any, ...]]:
        """The keys that this benchmark has and not all do, with their values: see ``BenchmarkRules``."""
        return list_benchmarks()[self.protocol].choices

    def choose(self, key: str) -> Any:
        """Return the value of one of these keys, or what null stands for."""
        value = getattr(self, key)
        return self.choices.get(key, (value,))[0] if value is None else value

    @property
    def asks_model(self) -> bool:
        """Whether a model is shown the images and asked about them, here or behind a server."""
        return self.backend in ("transformers", "http")

    @property
    def reads_scores(self) -> bool:
        """Whether every pair's score comes from a file, so that no image is opened and nothing is filtered."""
        return self.backend == "scores" or (self.backend == "features" and self.features is not None)

    @property
    def opens_images(self) -> bool:
        """Whether a model or the filter looks at images; else they are but pictures of the report."""
        return self.asks_model or not (self.reads_scores or self.filter in ("none", "npz"))

    @property
    def policy(self) -> ImagePolicy:
        """The image policy the model was trained with."""
        return ImagePolicy(self.chatreid_stage, self.chatreid_aspect, self.image_max_pixels, self.image_min_pixels)
