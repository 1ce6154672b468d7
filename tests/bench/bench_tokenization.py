"""Tokenization of records of eight images: stock LLaMA-Factory, which decodes every image, against the plugin.

Records carry their images' sizes, as `chatreid build` writes them. Crops are drawn at random sizes. Image queries
differ by wording and answer only; text queries have a caption of their own each.
Run: OMP_NUM_THREADS=1 python tests/bench/bench_tokenization.py [--records N]
"""

import argparse
import os
import random
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from llamafactory.data import get_template_and_fix_tokenizer, loader
from llamafactory.hparams import DataArguments, ModelArguments
from llamafactory.model import load_tokenizer
from PIL import Image

from chatreid_plugin.demo.people import sample_people
from chatreid_plugin.demo.tiny_model import TinySizes, write_tiny_model
from chatreid_plugin.records import Answer, ImageReference, Instruction, convert_instruction_to_row
from chatreid_plugin.tasks import TASKS
from chatreid_plugin.training.compat import get_upstream
from chatreid_plugin.training.loader import ORIGIN_COLUMN, LazyTokenizer, convert_record


FILES, IMAGES = 400, 8
KEYS = ("input_ids", "labels")


def write_images(folder: Path) -> list[ImageReference]:
    """Write JPEG crops with the sizes of real ones, 48x128 to 160x384 pixels, and coarse textures."""
    rng = np.random.default_rng(0)
    images: list[ImageReference] = []
    for number in range(FILES):
        width, height = int(rng.integers(48, 160)), int(rng.integers(128, 384))
        coarse = Image.fromarray(rng.integers(0, 255, (16, 8, 3), dtype=np.uint8))
        path = folder / f"{number}.jpg"
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(path, quality=90)
        images.append(ImageReference(path.name, width, height))
    return images


def make_image_queries(images: list[ImageReference], count: int) -> list[Instruction]:
    """Return records of one query and seven gallery images."""
    draw = random.Random(0)
    return [
        Instruction(
            f"record-{number}",
            "image_to_image_many_to_many",
            tuple(draw.sample(images, IMAGES)),
            1,
            Answer(indices=tuple(sorted(draw.sample(range(IMAGES - 1), draw.randint(1, 3))))),
            dataset="bench",
            variant=number % 2,
        )
        for number in range(count)
    ]


def make_text_queries(images: list[ImageReference], count: int) -> list[Instruction]:
    """Return records of a caption of thirty words, no two alike, and eight gallery images."""
    draw = random.Random(1)
    words = sorted(
        {word for task in TASKS.values() for prompt in task.prompts for word in re.findall("[a-z]+", prompt)}
    )
    return [
        Instruction(
            f"record-{number}",
            "text_to_image_one_to_many",
            tuple(draw.sample(images, IMAGES)),
            0,
            Answer(indices=(draw.randrange(IMAGES),)),
            captions=(" ".join(draw.choices(words, k=30)).capitalize() + ".",),
            dataset="bench",
            variant=number % 2,
        )
        for number in range(count)
    ]


def measure(encode: Callable[[int], Any], count: int) -> tuple[list[Any], float]:
    """Return what ``encode`` gives for each record, and records a second of processor time."""
    encode(0)  # not counted: what is made once
    start = time.process_time()
    found = [encode(number) for number in range(count)]
    return found, count / (time.process_time() - start)


def make_encoders(folder: Path, records: list[Instruction], backend: str) -> dict[str, Callable[[int], Any]]:
    """Return what tokenizes the record of a number, by stock LLaMA-Factory and by the plugin."""
    # LLaMA-Factory chooses the image processor's backend by this key; it plays no part in the plugin's counts.
    fast = backend == "torchvision"
    loaded = load_tokenizer(ModelArguments(model_name_or_path=str(folder / "model"), use_fast_tokenizer=fast))
    tokenizer, processor = loaded["tokenizer"], loaded["processor"]

    def get_processor(name: str) -> Any:
        data_args = DataArguments(template=name, cutoff_len=8192)
        template = get_template_and_fix_tokenizer(tokenizer, data_args)
        return get_upstream(loader, "_get_dataset_processor")(data_args, "sft", template, tokenizer, processor)

    stock, lazy = get_processor("qwen2_vl"), LazyTokenizer(get_processor("chatreid"), [(str(folder), ())])

    def encode_stock(number: int) -> Any:
        row = convert_record(records[number], str(folder))
        # Stock records hold paths alone.
        row["_images"] = [image["path"] for image in row["_images"]]
        return stock.preprocess_dataset({key: [value] for key, value in row.items()})

    def encode_ours(number: int) -> Any:
        row = convert_instruction_to_row(records[number]) | {ORIGIN_COLUMN: 0}
        return lazy({key: [value] for key, value in row.items()})

    return {"stock": encode_stock, "plugin": encode_ours}


def main() -> None:
    """Print a line for each way, the ratios, and whether the tokens are the same."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=400)
    count: int = parser.parse_args().records
    print(f"{len(os.sched_getaffinity(0))} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        images = write_images(folder)
        sizes = TinySizes(
            hidden=32, layers=2, heads=2, vision_hidden=32, vision_layers=2, patch_size=14, vocabulary=600
        )
        write_tiny_model(folder / "model", sample_people(20, 7), sizes=sizes, seed=1)
        kinds = {"image queries": make_image_queries(images, count), "text queries": make_text_queries(images, count)}
        for kind, records in kinds.items():
            for backend in ("torchvision", "PIL"):
                encoders = make_encoders(folder, records, backend)
                found = {name: measure(encode, count) for name, encode in encoders.items()}
                stock, plugin = found["stock"], found["plugin"]
                same = all(a[key] == b[key] for a, b in zip(stock[0], plugin[0], strict=True) for key in KEYS)
                print(
                    f"{kind}, {backend}: stock {stock[1]:.1f}, plugin {plugin[1]:.1f} records a core-second, ratio "
                    f"{plugin[1] / stock[1]:.1f}; same input_ids and labels: {same}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
