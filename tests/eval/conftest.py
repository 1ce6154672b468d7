"""A tiny data set in a temporary folder, and the golden generator, for the evaluator's tests."""

import importlib.util
import json
import pickle
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from chatreid_plugin.config import SourceSettings, load_settings
from chatreid_plugin.datasets.registry import list_benchmarks
from chatreid_plugin.demo.layouts import write_layout
from chatreid_plugin.engine.manifests import describe_origin, parse_source
from chatreid_plugin.eval.distributed import Processes
from chatreid_plugin.eval.settings import EvalSettings
from chatreid_plugin.images import resize_by_policy
from chatreid_plugin.records import ImageRecord, Split
from chatreid_plugin.shards import read_json, write_json, write_manifest
from chatreid_plugin.tasks import format_chat_prompt
from tests.support import make_eval_settings, place_key


GOLDEN = Path(__file__).parents[1] / "golden" / "make_vectors.py"
EVAL = Path(__file__).parents[2] / "eval"
COLOURS = ((200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30))
SIZE = (24, 48)

Item = tuple[str, str, str]
MakeWorld = Callable[..., Path]
ParseLayout = Callable[[str], Path]


@pytest.fixture(scope="session")
def golden() -> ModuleType:
    """Return tests/golden/make_vectors.py as a module."""
    spec = importlib.util.spec_from_file_location("golden_make_vectors", GOLDEN)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def make_record(split: str, person: str, camera: str, name: str = "") -> ImageRecord:
    """Return a record of the data set ``tiny``."""
    path = f"{split}/{name or f'{person}_c{camera}'}.png"
    width, height = SIZE
    return ImageRecord(f"tiny/{path}", "tiny", cast(Split, split), path, f"tiny:{person}", camera, width, height)


def list_default_items() -> list[Item]:
    """Four people, each queried in camera 1 and seen in cameras 1, 2 and 3 of the gallery."""
    queries = [("query", str(person), "1") for person in range(1, 5)]
    return queries + [("gallery", str(person), str(camera)) for person in range(1, 5) for camera in (1, 2, 3)]


@pytest.fixture
def make_world(tmp_path: Path) -> MakeWorld:
    """Return a function that writes images and a manifest; each person has a colour of its own."""

    def make(items: Sequence[Item] | None = None, *, images: bool = True) -> Path:
        records: list[ImageRecord] = []
        for number, (split, person, camera) in enumerate(items or list_default_items()):
            record = make_record(split, person, camera, f"{person}_c{camera}_{number}")
            records.append(record)
            if images:
                file = tmp_path / "images" / record.path
                file.parent.mkdir(parents=True, exist_ok=True)
                red, green, blue = COLOURS[int(person) % len(COLOURS)]
                colour = np.array([red, green, min(255, blue + number % 4)])
                shading = np.linspace(0.3, 1.0, SIZE[1])[:, None, None] * np.ones((1, SIZE[0], 1))
                Image.fromarray((colour * shading).astype(np.uint8)).save(file)
        manifest = tmp_path / "manifests" / "tiny.parquet"
        write_manifest(manifest, records, tmp_path / "images", {"made_by": "test"})
        return manifest

    return make


@pytest.fixture
def make_settings(tmp_path: Path) -> Callable[..., EvalSettings]:
    """Return a function that makes settings for a manifest, by default with the oracle and no filter."""

    def make(manifest: Path, **changes: Any) -> EvalSettings:
        values: dict[str, Any] = {
            "protocol": "folder",
            "manifest": manifest,
            "backend": "oracle",
            "filter": "none",
            "output_dir": tmp_path / "out",
        }
        return make_eval_settings(values | changes)

    return make


@pytest.fixture(scope="session")
def answer_plainly() -> Callable[..., float]:
    """Return a function that asks by one forward pass of transformers' own processor and model, with nothing shared.

    It takes a scorer, the folder of the images, a question with a mark for each image, and the images; it returns the
    margin of Yes over No.
    """
    import torch

    def answer(scorer: Any, root: Path, question: str, *records: ImageRecord) -> float:
        text = format_chat_prompt(question).replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
        images = [Image.open(root / record.path).convert("RGB") for record in records]
        images = [image.resize(resize_by_policy(*image.size, scorer.features.policy)) for image in images]
        inputs = scorer.processor(text=[text], images=images, return_tensors="pt")
        with torch.inference_mode():
            logits = scorer.model(**inputs).logits[0, -1].float()
        yes, no = (scorer.processor.tokenizer.convert_tokens_to_ids(word) for word in ("Yes", "No"))
        return float(logits[yes] - logits[no])

    return answer


@pytest.fixture(scope="session")
def copy_splits() -> Callable[[Path, Sequence[int]], Path]:
    """Return a function that copies a manifest for each split, as if it were that one; it returns {trial}'s path."""

    def copy(manifest: Path, splits: Sequence[int]) -> Path:
        provenance = read_json(manifest.with_suffix(".parquet.json"))
        for split in splits:
            target = manifest.with_name(f"{manifest.stem}_split{split}.parquet")
            shutil.copy(manifest, target)
            protocol = dict(provenance.get("protocol") or {})
            protocol |= {"trial": split} if "trial" in protocol else {}
            write_json(target.with_suffix(".parquet.json"), provenance | {"protocol": protocol})
        return manifest.with_name(f"{manifest.stem}_split{{trial}}.parquet")

    return copy


@dataclass(frozen=True)
class Case:
    """A shipped YAML of ``eval/`` on a synthetic layout, with further keys; ``trials`` counts its trials or splits."""

    recipe: str
    layout: str
    trials: int = 1
    changes: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def name(self) -> str:
        return "-".join([self.recipe, self.layout.replace(":", "_"), *map(str, self.changes.values())])

    def load(self, root: Path, **changes: Any) -> EvalSettings:
        """Return the YAML's settings for the layout, which is written and parsed below ``root`` unless it is there."""
        splits = load_settings(EVAL / f"{self.recipe}.yaml", [], EvalSettings).data.splits
        if splits:
            parsed = [write_and_parse(root, self.layout, split) for split in splits]
            manifest = parsed[0].with_name(parsed[0].name.replace(f".{splits[0]}.", ".{trial}."))
        else:
            manifest = write_and_parse(root, self.layout)
        values = {"manifest": manifest} | dict(self.changes) | changes
        overrides = [f"{place}={json.dumps(v, default=str)}" for key, v in values.items() for place in place_key(key)]
        return load_settings(EVAL / f"{self.recipe}.yaml", overrides, EvalSettings)


# What is run besides a file of eval/ as it is, on its data set; tests/bench/run_protocols.py runs all with a model.
_CASES = (
    Case("folder", "market1501"),
    Case("cuhk03_labeled", "cuhk03:labeled"),
    Case("cuhk03_labeled", "cuhk03:labeled_np"),
    Case("cuhk03_classic", "cuhk03:detected_classic", 20),
    Case("ltcc_cc", "ltcc"),
    Case("ltcc_cc", "ltcc", changes={"restrict": True}),
    Case("prcc_cross_clothes_single", "prcc", 10),
    Case("prcc_same_clothes_single", "prcc", 10),
    Case("sysumm01_all_single", "sysumm01", 10),
    Case("sysumm01_all_single", "sysumm01", 2, {"trials_from": "agw_seed", "trials": 2}),
    Case("sysumm01_all_multi", "sysumm01", 10),
    Case("sysumm01_indoor_single", "sysumm01", 10),
    Case("sysumm01_indoor_multi", "sysumm01", 10),
    Case("regdb_visible_to_infrared", "regdb", 10),
    Case("regdb_infrared_to_visible", "regdb", 10),
    Case("llcm", "llcm", 10),
    Case("llcm", "llcm", 10, {"setting": "visible_to_infrared"}),
    Case("attributes", "peta"),
    Case("attributes", "rapv1"),
    Case("multimodal", "cuhkpedes"),
    Case("multimodal", "icfgpedes"),
    Case("multimodal", "rapv1"),
    Case("multimodal", "rapv2", changes={"attributes": ["gender"]}),
)


def _list_cases() -> Iterator[Case]:
    """Yield the table's cases, and one for every other file of ``eval/``: on the layout of its data set."""
    yield from _CASES
    known = {case.recipe for case in _CASES}
    for path in sorted(EVAL.glob("*.yaml")):
        if path.stem not in known:
            settings = load_settings(path, [], EvalSettings)
            dataset = list_benchmarks()[settings.data.benchmark].dataset
            yield Case(path.stem, f"{dataset}:{settings.data.variant}" if settings.data.variant else dataset)


CASES = {case.name: case for case in _list_cases()}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    """Return every case in turn, or by ``indirect`` parameters those that are named."""
    return CASES[request.param]


@pytest.fixture
def all_cases() -> Mapping[str, Case]:
    """Return the whole table."""
    return CASES


@pytest.fixture
def make_case(case: Case, layouts_root: Path, tmp_path: Path) -> Callable[..., EvalSettings]:
    """Return a function that makes the case's settings, by default with the oracle and no filter."""

    def make(**changes: Any) -> EvalSettings:
        values = {"backend": "oracle", "filter": "none", "output_dir": tmp_path / "out", "report_queries": 1}
        return case.load(layouts_root, **values | changes)

    return make


@pytest.fixture(scope="session")
def layouts_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of all synthetic layouts and their manifests."""
    return tmp_path_factory.mktemp("benchmarks")


@pytest.fixture(scope="session")
def parse_layout(layouts_root: Path) -> ParseLayout:
    """Return a function that writes a layout, parses it once and returns its manifest."""

    def parse(layout: str) -> Path:
        return write_and_parse(layouts_root, layout)

    return parse


def write_and_parse(root: Path, layout: str, trial: int | None = None) -> Path:
    """Write a layout below ``root``, parse it (one of its trials), and return its manifest; what is there is kept."""
    name, _, variant = layout.partition(":")
    folder = root / "data" / f"{name}{variant}"
    manifest = root / (f"{folder.name}.parquet" if trial is None else f"{folder.name}.{trial}.parquet")
    if not manifest.with_name(f"{manifest.name}.json").exists():
        if not folder.exists():
            write_layout(layout, folder)
        source = SourceSettings(
            name=name, root=folder, variant=variant or None, trial=trial or 1, allow_count_mismatch=True
        )
        report = parse_source(source)
        provenance = {**describe_origin(source), "protocol": report.protocol}
        write_manifest(manifest, report.records, report.root, provenance)
    return manifest


@pytest.fixture
def run_together() -> Callable[[Sequence[Callable[[Processes], Any]]], list[Any]]:
    """Return a function that calls several functions, each as one of torchrun's processes; they are threads here."""

    def run(calls: Sequence[Callable[[Processes], Any]]) -> list[Any]:
        count = len(calls)
        barrier, values = threading.Barrier(count, timeout=60), [b""] * count

        class Thread(Processes):
            def gather(self, value: Any) -> list[Any]:
                values[self.rank] = pickle.dumps(value)  # torch.distributed gives copies, too
                barrier.wait()
                found = [pickle.loads(one) for one in values]
                barrier.wait()
                return found

        def call(rank: int) -> Any:
            try:
                return calls[rank](Thread(rank, count))
            except BaseException:
                barrier.abort()  # as torchrun ends all when one fails
                raise

        with ThreadPoolExecutor(count) as pool:
            threads = [pool.submit(call, rank) for rank in range(count)]
        # One that waited in vain only noticed that another had failed: it comes last.
        threads.sort(key=lambda thread: isinstance(thread.exception(), threading.BrokenBarrierError))
        return [thread.result() for thread in threads]

    return run
