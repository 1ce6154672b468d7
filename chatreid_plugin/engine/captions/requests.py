"""What an endpoint is asked about one crop, and how its answer is read; used online and by batch files alike."""

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ValidationError

from ...config import CaptioningSettings
from ...errors import DataError
from ...openai_answers import BrokenAnswer, Completion, check_value, read_as
from ...openai_client import make_image_part
from ...pixels import DAMAGE, convert_to_rgb, encode_picture, refuse_size
from ...regular_files import read_regular
from ...tasks import get_task


UNKNOWN = "unknown"
_COLOURS = (
    "black",
    "white",
    "grey",
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
    "brown",
    "beige",
    "multicoloured",
)
# The list of the paper's prompt (section 3.1.1): gender, age range, hair, type and colour of clothing, footwear,
# posture, patterns, accessories. Where values are listed, one has to be chosen; hard negatives compare colours.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "gender": ("male", "female"),
    "age": ("child", "young", "middle-aged", "elderly"),
    "hair": (),
    "upper_type": (),
    "upper_colour": _COLOURS,
    "upper_pattern": (),
    "lower_type": (),
    "lower_colour": _COLOURS,
    "lower_pattern": (),
    "shoes": (),
    "posture": (),
    "bag": (),
    "hat": (),
    "accessories": (),
}
_INSTRUCTIONS = (
    "\n\nDescribe only what can be seen; do not name or identify the person. Give {descriptions}, and the attributes "
    f'in a few words each, "{UNKNOWN}" where the image does not show them (shoes with their colour; "no bag", "no '
    'hat" where there is none). Set clothing_recognised to false if the clothing cannot be made out because the '
    "person is hidden, cut off, too dark or too blurred."
)
_JSON_INSTRUCTIONS = "\n\nAnswer with one JSON object and nothing else. Its JSON schema:\n"
# What endpoints take everywhere; LLaMA-Factory's, for one, refuses WebP.
_FORMATS = {"JPEG": "jpeg", "PNG": "png"}
_MODES = ("RGB", "L", "P")
# Braces of a text at which its JSON object may begin; each is tried.
_MOST_BEGINNINGS = 100


class Refusal(BrokenAnswer):
    """The model declines to describe the image."""


@dataclass(frozen=True, slots=True)
class Description:
    """What the endpoint says of one crop.

    Attributes:
        captions: as many as were asked for; empty if the clothing is not recognised.
        attributes: names of ``ATTRIBUTES``, those that the image does not show left out.
        clothing_recognised: False marks the crop as occluded (paper section 3.2).
    """

    captions: tuple[str, ...]
    attributes: Mapping[str, str]
    clothing_recognised: bool = True

    def make_line(self, path: str, model: str) -> dict[str, Any]:
        """Return the line of a captions file that ``manifests.py`` reads."""
        line: dict[str, Any] = {"path": path, "captions": list(self.captions), "attributes": dict(self.attributes)}
        if not self.clothing_recognised:
            line["clothing_recognised"] = False
        return {**line, "model": model}


def make_schema() -> dict[str, Any]:
    """Return the answer's JSON schema, within the subset of OpenAI's strict mode (all required, nothing further)."""
    attributes: dict[str, Any] = {
        name: {"type": "string", "enum": [*values, UNKNOWN]} if values else {"type": "string"}
        for name, values in ATTRIBUTES.items()
    }
    return _make_object(
        {
            "descriptions": {"type": "array", "items": {"type": "string"}},
            "attributes": _make_object(attributes),
            "clothing_recognised": {"type": "boolean"},
        }
    )


def _make_object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def write_prompt(count: int, *, structured: bool) -> tuple[str, str]:
    """Return the text before and after the image: the paper's prompt, verbatim, and what the answer has to hold.

    Args:
        count: descriptions for each image.
        structured: the schema goes with the request; otherwise it is part of the text.
    """
    before, _, after = get_task("image_captioning").prompts[0].partition("{image}")
    many = f"{count} descriptions of one to three sentences in different words" if count > 1 else "one description"
    after += _INSTRUCTIONS.replace("{descriptions}", many)
    return before, after if structured else f"{after}{_JSON_INSTRUCTIONS}{json.dumps(make_schema())}"


def show_prompt(settings: CaptioningSettings, *, structured: bool) -> str:
    """Return what is sent for each image, for a person to read."""
    before, after = write_prompt(settings.captions_per_image, structured=structured)
    text = f"{before}<crop, detail: {settings.detail}>{after}"
    return f"{text}\n\nresponse_format (json_schema, strict): {json.dumps(make_schema())}" if structured else text


def make_body(settings: CaptioningSettings, image_url: str, *, structured: bool) -> dict[str, Any]:
    """Return the body of a /v1/chat/completions request about one image."""
    before, after = write_prompt(settings.captions_per_image, structured=structured)
    image = make_image_part(image_url, detail=settings.detail)
    content = [{"type": "text", "text": before}, image, {"type": "text", "text": after}]
    body = {**settings.extra_body, "model": settings.model, "messages": [{"role": "user", "content": content}]}
    if structured:
        schema = {"name": "pedestrian", "strict": True, "schema": make_schema()}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return body


def encode_image(path: Path) -> str:
    """Return a crop as a data URL: the file's own bytes if JPEG or PNG with 8 bits a channel, else a new PNG.

    Raises:
        DataError: the file is missing, no image, or cut short.
    """
    try:
        content = read_regular(path)
        with Image.open(io.BytesIO(content)) as image:
            refuse_size(*image.size)
            image.load()
            if image.format in _FORMATS and image.mode in _MODES:
                return _make_data_url(_FORMATS[image.format], content)
            return encode_picture(convert_to_rgb(image))
    except UnidentifiedImageError:  # its message is the address of our buffer
        raise DataError(f"{path} cannot be read as an image: its format is not known") from None
    except DAMAGE as error:
        raise DataError(f"{path} cannot be read as an image: {error}") from None


def _make_data_url(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


class _Reply(BaseModel):
    """A description as the schema has it, its attributes not yet looked at."""

    clothing_recognised: bool
    descriptions: list[str] = []
    attributes: dict[str, str] = {}


def read_completion(body: object, count: int) -> Description:
    """Read the body of a chat completion.

    Args:
        body: the decoded JSON.
        count: descriptions that were asked for.

    Raises:
        BrokenAnswer: no chat completion, a refusal, broken JSON or the wrong schema; the message says which.
    """
    message = read_as(Completion, body).choices[0].message
    if message and message.refusal:
        raise Refusal(f"refusal: {_cut(message.refusal)}")
    if message is None or message.content is None:
        raise BrokenAnswer("no chat completion: it has no text")
    value = _find_object(message.content)
    # Nothing else counts then.
    value = value if value.get("clothing_recognised") is not False else {"clothing_recognised": False}
    try:
        reply = _Reply.model_validate(value, strict=True)
    except ValidationError as fault:
        found = fault.errors()[0]
        raise BrokenAnswer(f"wrong schema: {'.'.join(map(str, found['loc']))}: {found['msg']}") from None
    if not reply.clothing_recognised:
        return Description((), {}, clothing_recognised=False)
    captions = [" ".join(text.split()) for text in reply.descriptions if text.strip()]
    if len(captions) < count:
        raise BrokenAnswer(f"wrong schema: {len(captions)} descriptions instead of {count}")
    return Description(tuple(captions[:count]), _check_attributes(reply.attributes))


def _find_object(text: str) -> dict[str, Any]:
    """Return the first JSON object of a text: models without structured output put words or fences around it."""
    decoder = json.JSONDecoder()
    start = text.find("{")
    for _ in range(_MOST_BEGINNINGS):
        if start < 0:
            break
        try:
            return cast(dict[str, Any], check_value(decoder.raw_decode(text, start)[0]))
        except (ValueError, RecursionError):
            start = text.find("{", start + 1)
    raise BrokenAnswer(f"broken JSON: {_cut(text)}")


def _check_attributes(found: Mapping[str, str]) -> dict[str, str]:
    """Return the attributes that the image shows, in the words that are allowed."""
    attributes: dict[str, str] = {}
    for name, allowed in ATTRIBUTES.items():
        if name not in found:
            raise BrokenAnswer(f"wrong schema: attributes has no {name}")
        text = " ".join(found[name].lower().split())
        if text in ("", UNKNOWN):
            continue
        if allowed and text not in allowed:
            raise BrokenAnswer(f"wrong schema: attribute {name} has the value {_cut(text)!r}")
        attributes[name] = text
    return attributes


def _cut(text: str) -> str:
    return " ".join(text.split())[:120]
