"""Time a search of many crops with a model, and the index of 100,000 synthetic images."""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from chatreid_plugin.archives import ScoreArray
from chatreid_plugin.eval.backends.base import StoredFeature
from chatreid_plugin.eval.filter import keep_similar, number_distinct
from chatreid_plugin.records import ImageRecord
from chatreid_plugin.search.gallery import Index
from chatreid_plugin.search.session import open_session


BATCH = 32


def measure(what: str, run: Callable[[], Any]) -> Any:
    """Run, and print how long it took, and how much of a processor's time."""
    start, used = time.perf_counter(), time.process_time()
    found = run()
    print(f"{what}: {time.perf_counter() - start:.2f} s, {time.process_time() - used:.2f} s of processor time")
    return found


def search_crops(checkpoint: str, images: int, folder: Path) -> None:
    """Index crops of noise, and take some turns."""
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for number in range(images):
        pixels = rng.integers(0, 256, (16, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 128)).save(folder / "photos" / f"{number:05}.png")
    keys = ["model.device=cpu", "filter.top_k=20", "filter.floor=0"]
    session = measure("model loaded and indexed", lambda: open_session(folder / "photos", checkpoint, keys))
    measure("opened again", lambda: open_session(folder / "photos", checkpoint, keys))
    measure("an image turn, 20 pairs", lambda: session.ask(use="00007.png"))
    measure("a text turn after it, 20 pairs", lambda: session.ask(text="a woman in a red coat"))
    print(f"images encoded in it: {session.ranked.encoded}")
    measure("marks", lambda: session.ask(same=[1], different=[2, 3]))


def describe_index(images: int, width: int, tokens: int, folder: Path) -> None:
    """Write an index of synthetic images, and rank by it."""
    rng = np.random.default_rng(0)
    records = [
        ImageRecord(f"{number:016x}", "s", "gallery", f"{number}.png", "", "", 64, 128) for number in range(images)
    ]

    def compute(new: Sequence[ImageRecord]) -> Iterator[tuple[Sequence[ImageRecord], ScoreArray, Any]]:
        shape = 1, tokens, width
        stored = StoredFeature((1, 2, 2 * tokens), shape, bytes(2 * tokens * width))
        for start in range(0, len(new), BATCH):
            rows = rng.standard_normal((BATCH, width), dtype=np.float32)
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            batch = new[start : start + BATCH]
            yield batch, rows[: len(batch)], [stored] * len(batch) if tokens else None

    measure(f"{images:,} images written", lambda: Index(folder, {}).add(records, compute, lambda done, count: None))
    index = measure("index opened", lambda: Index(folder, {}))
    features = measure("features read", lambda: index.take_features(record.image_id for record in records))
    measure("equal ones found, once a session", lambda: number_distinct(features))
    nobody = np.zeros(images, dtype=np.bool_)
    measure("filtered for a query", lambda: keep_similar(features @ features[7], nobody, -1.0, 100, 20))
    for file in sorted(index.folder.iterdir()):
        print(f"{file.name}: {file.stat().st_size / 1e6:,.0f} MB")
    print(f"peak RSS: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?", help="searches crops of noise; without one, the index alone is timed")
    parser.add_argument("--crops", type=int, default=1000)
    parser.add_argument("--images", type=int, default=100_000, help="of the synthetic index")
    parser.add_argument("--width", type=int, default=1536, help="of its features")
    parser.add_argument("--tokens", type=int, default=0, help="visual tokens an image, 0 for none on disk")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.checkpoint:
            search_crops(options.checkpoint, options.crops, Path(folder))
        else:
            describe_index(options.images, options.width, options.tokens, Path(folder) / "index")


if __name__ == "__main__":
    main()
