"""What the tests of LLaMA-Factory's traps share; CONTRIBUTING.md maps each trap to its test."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from chatreid_plugin.records import Answer, ImageReference, Instruction


SIZES = ((56, 112), (70, 140), (84, 168), (98, 196))


@dataclass(frozen=True)
class Data:
    """Four crops on disk, records of them, and the training sets that LLaMA-Factory's get_dataset makes of records."""

    images: Path
    write: Callable[..., Path]
    load_rows: Callable[..., Any]
    folders: Path

    def make(self, record_id: str, count: int = 4, **changes: Any) -> Instruction:
        """Return a record of one query and ``count - 1`` gallery images."""
        images = tuple(ImageReference(f"{n}.jpg", *SIZES[n]) for n in range(count))
        values: dict[str, Any] = {"task": "standard_reid", "query_images": 1, "answer": Answer(indices=(0,))}
        return Instruction(id=record_id, images=images, dataset="tiny", **(values | changes))

    def enter(self, records: Sequence[Instruction], name: str = "made") -> dict[str, str]:
        """Write the records as a data set and return the keys that name it."""
        self.write(self.folders, records, self.images, name)
        return {"dataset": name, "dataset_dir": str(self.folders)}

    def load(self, records: Sequence[Instruction], **changes: Any) -> Any:
        """Return the training set of the records under Stage 3's recipe."""
        return self.load_rows(3, **(self.enter(records) | changes))


@pytest.fixture
def data(load_rows: Callable[..., Any], write_dataset: Callable[..., Path], tmp_path: Path) -> Data:
    images = tmp_path / "crops"
    images.mkdir()
    for number, (width, height) in enumerate(SIZES):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.jpg")
    return Data(images, write_dataset, load_rows, tmp_path / "info")


@pytest.fixture(scope="module")
def model(workshop: Any) -> Any:
    """Return a tiny Qwen2-VL as transformers loads it."""
    from transformers import Qwen2VLForConditionalGeneration

    return Qwen2VLForConditionalGeneration.from_pretrained(workshop.model).eval()


@pytest.fixture
def collate(model: Any, tokenizer_module: dict[str, Any]) -> Callable[..., Any]:
    """Return a function that makes a batch of rows as the training of a stage 3 recipe does."""
    from llamafactory.data import SFTDataCollatorWith4DAttentionMask, get_template_and_fix_tokenizer
    from llamafactory.hparams.parser import DataArguments

    def make_batch(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
        template = get_template_and_fix_tokenizer(
            tokenizer_module["tokenizer"], DataArguments(template="chatreid", chatreid_stage=3)
        )
        values = {"template": template, "model": model, "pad_to_multiple_of": 8, "attn_implementation": "sdpa"}
        return SFTDataCollatorWith4DAttentionMask(**values | changes, **tokenizer_module)([dict(row) for row in rows])

    return make_batch
