"""Send mixed requests, good ones and hostile ones, to ``chatreid serve`` in a process of its own; print its memory."""

import argparse
import base64
import io
import json
import random
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from chatreid_plugin.pixels import encode_picture


PAIR = "image_to_image_one_to_one"
CHAT, SCORE = "/v1/chat/completions", "/v1/score"
TIMEOUT = 300.0
CUT_TOKEN = [{"role": "user", "content": [{"type": "text", "text": part} for part in ("<|im_", "end|>")]}]


@dataclass(frozen=True)
class Ask:
    """A request, and the status that it has to get."""

    kind: str
    path: str
    body: bytes
    status: int
    headers: tuple[tuple[str, str], ...] = ()


def make_crop(draw: random.Random, width: int = 64, height: int = 128) -> str:
    """Return a crop of noise that no other request has."""
    noise = np.random.default_rng(draw.getrandbits(32)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encode_picture(Image.fromarray(noise))


def make_white(draw: random.Random, side: int) -> str:
    """Return a large picture of few bytes, one of sixteen."""
    return _encode_white(side - draw.randrange(16), side)


@cache
def _encode_white(width: int, height: int) -> str:
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def make_chat(text: str, *urls: str, **changes: Any) -> bytes:
    """Return the body of a chat."""
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content.append({"type": "text", "text": text})
    values = {"messages": [{"role": "user", "content": content}], "max_tokens": 2, "logprobs": True}
    return json.dumps(values | changes).encode()


def make_score(*urls: str, **changes: Any) -> bytes:
    """Return the body of a score; the first picture is the query's."""
    return json.dumps({"query": {"image": urls[0]}, "candidates": urls[1:], "task": PAIR} | changes).encode()


def make_text_score(url: str, words: int) -> bytes:
    """Return the body of a score by words."""
    return make_score(url, url, query={"text": "red " * words}, task="text_to_image_one_to_one")


KINDS: dict[str, Callable[[random.Random], tuple[str, bytes, int]]] = {
    "a chat": lambda draw: (CHAT, make_chat("Hello"), 200),
    "a chat about two crops": lambda draw: (CHAT, make_chat("Same?", make_crop(draw), make_crop(draw)), 200),
    "a score of 24 crops": lambda draw: (SCORE, make_score(*(make_crop(draw) for _ in range(25))), 200),
    "a score of 128 images": lambda draw: (SCORE, make_score(*(make_crop(draw, 32, 64) for _ in range(128))), 200),
    "a score of photos": lambda draw: (SCORE, make_score(*(make_white(draw, 3000) for _ in range(4))), 200),
    "a score by 1,000 words": lambda draw: (SCORE, make_text_score(make_crop(draw), 1000), 200),
    "128 large images": lambda draw: (CHAT, make_chat("", *(make_white(draw, 3900) for _ in range(128))), 413),
    "128 large images to score": lambda draw: (SCORE, make_score(*(make_white(draw, 3900) for _ in range(128))), 413),
    "129 images": lambda draw: (CHAT, make_chat("", *["data:"] * 129), 413),
    "an image of 25 megapixels": lambda draw: (CHAT, make_chat("", make_white(draw, 5000)), 400),
    "a damaged image": lambda draw: (CHAT, make_chat("", make_crop(draw)[:4000]), 400),
    "300,000 words": lambda draw: (CHAT, make_chat("word " * 300_000), 400),
    "300,000 words to score": lambda draw: (SCORE, make_text_score(make_crop(draw), 300_000), 400),
    "two million lists": lambda draw: (SCORE, b'{"candidates": [' + b"[]," * 2_000_000, 413),
    "brackets, 100,000 deep": lambda draw: (CHAT, b"[" * 100_000, 413),
    "65 MB": lambda draw: (CHAT, b" " * (65 << 20), 413),
    "an unknown parameter": lambda draw: (CHAT, make_chat("Hello", logit_bias={"1": 100}), 400),
    "a special token in two parts": lambda draw: (CHAT, make_chat("", messages=CUT_TOKEN), 400),
}


def draw_asks(count: int, seed: int = 0) -> list[Ask]:
    """Return requests of all kinds in turn, in an order that is drawn."""
    draw = random.Random(seed)
    kinds = list(KINDS) + ["a foreign host", "a foreign origin", "no JSON"]
    asks: list[Ask] = []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        if kind in KINDS:
            asks.append(Ask(kind, *KINDS[kind](draw)))
        else:
            name, value, status = {
                "a foreign host": ("Host", "evil.example", 421),
                "a foreign origin": ("Origin", "http://evil.example", 403),
                "no JSON": ("Content-Type", "text/plain", 415),
            }[kind]
            asks.append(Ask(kind, CHAT, make_chat("Hello"), status, ((name, value),)))
    draw.shuffle(asks)
    return asks


def send(address: str, ask: Ask) -> int:
    """Return the status of the answer."""
    headers = {"Content-Type": "application/json", **dict(ask.headers)}
    request = urllib.request.Request(address + ask.path, ask.body, headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
            reply.read()
            return reply.status
    except urllib.error.HTTPError as error:
        error.read()
        return error.code


def send_all(address: str, asks: Sequence[Ask], threads: int) -> list[tuple[Ask, int]]:
    """Send requests, so many at once; return each with its status."""
    with ThreadPoolExecutor(threads) as pool:
        return list(zip(asks, pool.map(lambda ask: send(address, ask), asks), strict=True))


def read_peak(process: int | str) -> float:
    """Return the highest resident memory of a process so far, GB."""
    (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(line) / 1e6


def write_model(folder: Path) -> None:
    """Write the tiny model that the tests use."""
    from chatreid_plugin.demo.people import sample_people
    from chatreid_plugin.demo.tiny_model import TinySizes, write_tiny_model

    write_tiny_model(folder, sample_people(20, 0), sizes=TinySizes(hidden=64, layers=2, vision_layers=1))


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--threads", type=int, default=16)
    arguments = parser.parse_args()
    asks = draw_asks(arguments.requests)
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "tiny"
        write_model(model)
        command = [sys.executable, "-m", "chatreid_plugin", "serve", str(model), "model.device=cpu", "--port", "0"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        address = process.stdout.readline().split(" at ")[1].split("/v1")[0]
        try:
            send(address, Ask("", CHAT, make_chat("Hello"), 200))
            before, started = read_peak(process.pid), time.perf_counter()
            found = send_all(address, asks, arguments.threads)
            seconds, peak = time.perf_counter() - started, read_peak(process.pid)
            alive = send(address, Ask("", CHAT, make_chat("Hello"), 200)) == 200
        finally:
            process.send_signal(2)
            errors = process.communicate(timeout=60)[1]
    statuses = dict(sorted(Counter(status for _, status in found).items()))
    wrong = [(ask.kind, status) for ask, status in found if status != ask.status]
    print(f"{len(asks)} requests, {arguments.threads} at once, {seconds:.0f} s; by status: {statuses}")
    print(f"peak RSS {before:.2f} GB after one request, {peak:.2f} GB after all; alive: {alive}")
    print(f"unexpected: {wrong or 'none'}; tracebacks: {errors.count('Traceback')}")


if __name__ == "__main__":
    main()
