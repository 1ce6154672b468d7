"""Tests of chatreid_plugin.engine.captions: requests and estimate."""

import base64
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chatreid_plugin.config import BuildSettings, CaptioningSettings
from chatreid_plugin.engine.captions.endpoint import count_image_tokens, describe_image_rule, estimate_captions
from chatreid_plugin.engine.captions.requests import ATTRIBUTES, encode_image, make_schema, show_prompt
from chatreid_plugin.errors import DataError


def decode(url: str) -> tuple[str, bytes]:
    kind, _, text = url.partition(";base64,")
    return kind, base64.b64decode(text)


@pytest.mark.parametrize(("format", "kind"), [("JPEG", "jpeg"), ("PNG", "png")])
def test_accepted_formats_are_sent_as_they_are(
    make_image: Callable[..., Path], tmp_path: Path, format: str, kind: str
) -> None:
    path = make_image(tmp_path / "crop.bmp", format=format)  # what counts is the content, not the name
    assert decode(encode_image(path)) == (f"data:image/{kind}", path.read_bytes())


@pytest.mark.parametrize("format", ["BMP", "TIFF", "WEBP"])
def test_other_formats_are_sent_as_png(make_image: Callable[..., Path], tmp_path: Path, format: str) -> None:
    path = make_image(tmp_path / "crop.jpg", format=format)
    kind, content = decode(encode_image(path))
    assert kind == "data:image/png"
    with Image.open(io.BytesIO(content)) as sent, Image.open(path) as original:
        assert sent.format == "PNG"
        assert np.array_equal(np.asarray(sent), np.asarray(original.convert("RGB")))


def test_sixteen_bit_image_is_sent_with_eight(tmp_path: Path) -> None:
    Image.fromarray(np.full((64, 32), 0x8000, dtype=np.uint16)).save(tmp_path / "infrared.png")
    _, content = decode(encode_image(tmp_path / "infrared.png"))
    with Image.open(io.BytesIO(content)) as sent:
        assert (sent.mode, sent.getpixel((0, 0))) == ("RGB", (128, 128, 128))


def test_image_cut_short_is_refused(make_image: Callable[..., Path], tmp_path: Path) -> None:
    path = make_image(tmp_path / "crop.jpg")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"crop\.jpg cannot be read"):
        encode_image(path)


def test_schema_keeps_to_openais_strict_mode() -> None:
    schema = make_schema()
    for part in (schema, schema["properties"]["attributes"]):
        assert part["required"] == list(part["properties"])
        assert part["additionalProperties"] is False
    assert set(schema["properties"]["attributes"]["properties"]) == set(ATTRIBUTES)
    assert "unknown" in schema["properties"]["attributes"]["properties"]["gender"]["enum"]


def test_prompt_shown_holds_the_schema_either_way() -> None:
    settings = CaptioningSettings(model="gpt-4o")
    assert "response_format (json_schema, strict): {" in show_prompt(settings, structured=True)
    assert "Answer with one JSON object and nothing else" in show_prompt(settings, structured=False)


@pytest.mark.parametrize(
    ("model", "detail", "size", "expected"),
    [
        ("gpt-4o", "low", (64, 128), 85),
        ("gpt-4o-2024-08-06", "high", (64, 128), 255),
        # The two examples of OpenAI's guide for gpt-4o, high detail.
        ("gpt-4o", "high", (1024, 1024), 765),
        ("gpt-4o", "high", (2048, 4096), 1105),
        ("gpt-4o-mini", "low", (64, 128), 2833),
        ("gpt-4.1-mini", "low", (64, 128), 13),  # 2 x 4 patches x 1.62
        ("gpt-4.1-mini", "high", (4096, 4096), 2489),  # 1536 x 1.62
        ("Qwen/Qwen2-VL-2B-Instruct", "low", (56, 112), 8),
    ],
)
def test_image_tokens(model: str, detail: str, size: tuple[int, int], expected: int) -> None:
    settings = CaptioningSettings.model_validate({"model": model, "detail": detail})
    assert count_image_tokens(settings, *size) == expected
    assert "tokens" in describe_image_rule(settings) or "token for every 28x28" in describe_image_rule(settings)


def test_estimate_adds_up(make_captioning: Callable[..., BuildSettings]) -> None:
    prices = {"price_per_million_input_tokens": 2.0, "price_per_million_output_tokens": 10.0}
    values = estimate_captions(make_captioning(requests_per_minute=3, **prices), [], None).values
    assert values["image_tokens"] == 6 * 85
    assert 6 * 85 + 6 * 400 < values["input_tokens"] < 6 * 85 + 6 * 2000
    assert values["price"] == pytest.approx((2 * values["input_tokens"] + 10 * values["output_tokens"]) / 1e6)
    assert values["minutes"] == 2.0


def test_time_is_bound_by_the_tighter_limit(make_captioning: Callable[..., BuildSettings]) -> None:
    report = estimate_captions(make_captioning(requests_per_minute=600, tokens_per_minute=1000), [], 3)
    values = report.values
    assert values["minutes"] == pytest.approx((values["input_tokens"] + values["output_tokens"]) / 1000)
    assert values["price"] is None and "price: not known" in report.render()


def test_time_without_limits_is_not_known(make_captioning: Callable[..., BuildSettings]) -> None:
    report = estimate_captions(make_captioning(), [], None)
    assert report.values["minutes"] is None and "as fast as the endpoint answers" in report.render()


@pytest.mark.parametrize(
    "changes",
    [
        {"base_url": "https://user:password@host/v1"},
        {"base_url": "api.openai.com"},
        {"api_key_variable": "sk-0123456789"},
        {"concurrency": 0},
        {"max_failures": 1.5},
        {"timeout": 0},
        {"api_key": "sk-0123456789"},
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        CaptioningSettings.model_validate({"model": "gpt-4o"} | changes)
