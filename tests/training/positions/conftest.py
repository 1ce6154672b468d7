"""Tiny models of three families behind LLaMA-Factory's chat, and the positions that they compute with."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from chatreid_plugin.demo.people import sample_people
from chatreid_plugin.demo.tiny_model import TinySizes, write_tiny_model
from chatreid_plugin.records import Answer, ImageReference, Instruction
from chatreid_plugin.tasks import render_prompt


PAIR, GALLERY = "image_to_image_one_to_one", "standard_reid"
TASKS = {PAIR: Answer(match=True), GALLERY: Answer(indices=(0,))}
SIZES = {
    "pair": [(64, 128), (90, 200)],
    "square": [(128, 128), (33, 190)],
    "gallery": [(64, 128), (150, 300), (56, 56), (200, 90)],
}
STEPS = 4


@dataclass
class Trace:
    """What a model computed: position ids (3, B, L) and last logits (B, V) of each forward pass, and the first ids."""

    positions: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    input_ids: list[torch.Tensor] = field(default_factory=list)

    @property
    def all_positions(self) -> torch.Tensor:
        return torch.cat(self.positions, dim=-1)

    @property
    def tokens(self) -> list[int]:
        return [int(step[0].argmax()) for step in self.logits]


@contextmanager
def trace(model: Any) -> Generator[Trace]:
    """Record what the language model is given and what the whole model returns."""
    found = Trace()

    def see_positions(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        # generate puts a row of text positions before the three that rotate queries and keys.
        found.positions.append(named["position_ids"][-3:].clone())

    def see_logits(module: Any, arguments: Any, named: dict[str, Any], output: Any) -> None:
        found.input_ids.append(named["input_ids"])
        found.logits.append(output.logits[:, -1].float())

    handles = [
        model.model.language_model.register_forward_pre_hook(see_positions, with_kwargs=True),
        model.register_forward_hook(see_logits, with_kwargs=True),
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def make_record(name: str) -> Instruction:
    task = GALLERY if len(SIZES[name]) > 2 else PAIR
    images = tuple(ImageReference(f"{w}x{h}.png", w, h) for w, h in SIZES[name])
    return Instruction(name, task, images, 1 if task == GALLERY else 2, TASKS[task])


@dataclass(frozen=True)
class Checkpoint:
    """A tiny model of a family, its template, and the stock template with the same chat format."""

    folder: Path
    template: str
    stock: str


@pytest.fixture(scope="session", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def checkpoint(request: pytest.FixtureRequest, workshop: Any, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    if request.param == "qwen2_vl":
        return Checkpoint(workshop.model, "chatreid", "qwen2_vl")
    folder = tmp_path_factory.mktemp(request.param)
    small: dict[str, int] = {"hidden": 32, "heads": 2, "vision_hidden": 32, "patch_size": 14, "vocabulary": 600}
    write_tiny_model(folder, sample_people(20, 7), sizes=TinySizes(**small), seed=1, family=request.param)
    stock = "qwen3_vl_nothink" if request.param == "qwen3_vl" else "qwen2_vl"
    return Checkpoint(folder, f"chatreid_{request.param}", stock)


@dataclass(frozen=True)
class Service:
    """The chat model as ``llamafactory-cli chat`` and ``api`` make it, and a folder of images."""

    chat: Any
    images: Path
    checkpoint: Checkpoint

    sizes = SIZES
    make_record = staticmethod(make_record)
    trace = staticmethod(trace)

    @property
    def model(self) -> Any:
        return self.chat.engine.model

    @property
    def template(self) -> Any:
        return self.chat.engine.template

    def ask(self, record: Instruction, **changes: Any) -> Trace:
        """Return the trace of a greedy answer to a record."""
        paths = [str(self.images / image.path) for image in record.images]
        with trace(self.model) as found:
            self.chat.chat([{"role": "user", "content": render_prompt(record)}], images=paths, **changes)
        return found


@pytest.fixture(scope="session")
def service(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Service:
    from llamafactory.chat import ChatModel

    folder = tmp_path_factory.mktemp("crops")
    rng = np.random.default_rng(5)
    for width, height in {size for sizes in SIZES.values() for size in sizes}:
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{width}x{height}.png")
    arguments: dict[str, Any] = {"model_name_or_path": str(checkpoint.folder), "template": checkpoint.template}
    arguments["chatreid_stage"] = 3
    chat = ChatModel(arguments | {"infer_dtype": "float32", "do_sample": False, "max_new_tokens": STEPS})
    return Service(chat, folder, checkpoint)
