"""LLaMA-Factory in this process, with the plugin's hooks, and what its own set-up functions return."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from chatreid_plugin.records import INSTRUCTION_SCHEMA, Instruction, convert_instruction_to_row
from chatreid_plugin.shards import read_json, write_json, write_shard


RECIPES = Path(__file__).parents[2] / "examples"


@dataclass(frozen=True)
class Parsed:
    """What ``get_train_args`` returns."""

    model: Any
    data: Any
    training: Any
    finetuning: Any


@pytest.fixture(scope="session", autouse=True)
def hooks_at_work() -> None:
    """Install the finder where the ``.pth`` file has not done so, before anything imports LLaMA-Factory."""
    from chatreid_plugin import _autoload

    _autoload.install()


@pytest.fixture
def parse(workshop: Any, tmp_path: Path) -> Callable[..., Parsed]:
    """Return a function that parses a shipped recipe with overrides, as ``llamafactory-cli train`` does."""
    from llamafactory.hparams import get_train_args

    def parse_recipe(stage: int, /, **changes: Any) -> Parsed:
        values = yaml.safe_load((RECIPES / f"stage{stage}.yaml").read_text())
        values |= workshop.list_overrides(stage, tmp_path / "out", cache_dir=str(tmp_path / "cache"))
        values |= changes
        return Parsed(*get_train_args(values)[:4])

    return parse_recipe


@pytest.fixture(scope="session")
def write_dataset() -> Callable[..., Path]:
    """Return a function that writes records as a data set of one shard, enters it, and returns the shard."""

    def write(dataset_dir: Path, records: Sequence[Instruction], image_root: Path, name: str = "made") -> Path:
        shard = dataset_dir / name / "00000.parquet"
        write_shard(shard, [convert_instruction_to_row(record) for record in records], INSTRUCTION_SCHEMA)
        info = dataset_dir / "dataset_info.json"
        entry = {"file_name": name, "formatting": "chatreid", "chatreid": {"image_root": str(image_root)}}
        write_json(info, (read_json(info) if info.is_file() else {}) | {name: entry})
        return shard

    return write


@pytest.fixture
def load_rows(parse: Callable[..., Parsed], tokenizer_module: dict[str, Any]) -> Callable[..., Any]:
    """Return a function that gives the training set of a recipe as LLaMA-Factory's own get_dataset makes it."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer

    def load(stage: int, **changes: Any) -> Any:
        parsed = parse(stage, **changes)
        template = get_template_and_fix_tokenizer(tokenizer_module["tokenizer"], parsed.data)
        module = get_dataset(template, parsed.model, parsed.data, parsed.training, stage="sft", **tokenizer_module)
        return module["train_dataset"]

    return load


@pytest.fixture
def load_records(
    load_rows: Callable[..., Any], write_dataset: Callable[..., Path], tmp_path: Path
) -> Callable[..., Any]:
    """Return a function that writes records and gives their rows as LLaMA-Factory's get_dataset does."""
    folders = iter(range(100))

    def load(*records: Instruction, **changes: Any) -> Any:
        folder = tmp_path / f"info{next(folders)}"
        write_dataset(folder, records, tmp_path)
        return load_rows(3, dataset="made", dataset_dir=str(folder), **changes)

    return load


@pytest.fixture
def read_recipe(workshop: Any, tmp_path: Path) -> Callable[..., Any]:
    """Return a function that parses a shipped recipe with overrides, as ``chatreid doctor --yaml`` does."""
    from chatreid_plugin.training.recipe import parse_recipe

    def read(stage: int, /, **changes: object) -> Any:
        # Both limits as inference files that are silent about them take them.
        overrides = workshop.list_overrides(stage, tmp_path / "out", image_max_pixels=589824, **changes)
        path = RECIPES / f"stage{stage}.yaml"
        return parse_recipe(path, [f"{k}={'null' if v is None else v}" for k, v in overrides.items()])

    return read


@pytest.fixture(scope="session")
def tokenizer_module(workshop: Any) -> dict[str, Any]:
    """Return tokenizer and processor as LLaMA-Factory loads them."""
    from llamafactory.hparams import ModelArguments
    from llamafactory.model import load_tokenizer

    return load_tokenizer(ModelArguments(model_name_or_path=str(workshop.model)))


@pytest.fixture(scope="session")
def make_line() -> Callable[[], Any]:
    """Return a function that makes the smallest model that the Trainer trains, always with the same weights."""
    import torch

    class Line(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.line = torch.nn.Linear(2, 1)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (self.line(x) - 1).square().mean()}

    return Line
