"""LLaMA-Factory's Qwen2-VL plugin with the stage's image policy, and token counts from sizes instead of pixels."""

from dataclasses import dataclass, field
from io import BytesIO
from types import ModuleType
from typing import Any

import torch
from llamafactory.data.mm_plugin import Qwen2VLPlugin
from PIL import Image

from ..crops import DAMAGE, prepare_crop
from ..errors import DataError
from ..images import (
    DEFAULT_IMAGE_MAX_PIXELS,
    DEFAULT_IMAGE_MIN_PIXELS,
    ImagePolicy,
    PatchGeometry,
    count_grid,
)
from .compat import get_function, get_upstream


PLUGIN_NAME = "chatreid_qwen2_vl"


def _describe(image: Any) -> str:
    if isinstance(image, dict):
        where = f"{image.get('path')}"
        return f"{where} (record {image['record']})" if image.get("record") else where
    return image if isinstance(image, str) else f"<{type(image).__name__}>"


def open_image(image: Any) -> Image.Image:
    """Open an image given as a path, bytes, a file, a PIL image or a dict with ``path`` or ``bytes``.

    Raises:
        DataError: the file is missing, empty or no image; names the file and, where known, the record.
    """
    if isinstance(image, Image.Image):
        return image
    source: Any = image
    if isinstance(image, dict):
        source = image["bytes"] if image.get("bytes") is not None else image.get("path")  # pyright: ignore
    if isinstance(source, bytes):
        source = BytesIO(source)
    try:
        return Image.open(source)
    except FileNotFoundError:
        raise DataError(f"Image {_describe(image)} does not exist.") from None
    except DAMAGE as error:
        raise DataError(f"Image {_describe(image)} cannot be opened: {error}") from None


def read_size(image: Any) -> tuple[int, int]:
    """Return (width, height): from the record if it says, else from the file's header; pixels are not decoded."""
    if isinstance(image, dict) and image.get("width") and image.get("height"):
        return image["width"], image["height"]
    opened = open_image(image)
    size = opened.size
    if opened is not image:
        opened.close()
    return size


def _check_size(image: Any, size: tuple[int, int]) -> None:
    # The tokens were counted from the record's size: another image would stop the model with a shape mismatch.
    if isinstance(image, dict) and image.get("width") and image.get("height"):
        stated = image["width"], image["height"]
        if stated != size:
            raise DataError(
                f"Image {_describe(image)} is {size[0]}x{size[1]} pixels, but the record says "
                f"{stated[0]}x{stated[1]}: the file has been replaced. Build the records again."
            )


@dataclass
class ChatReIDPlugin(Qwen2VLPlugin):
    """Qwen2-VL's plugin; ``policy`` is set from the YAML when the template is fetched."""

    policy: ImagePolicy = field(default_factory=ImagePolicy)

    def _preprocess_image(self, image: Image.Image, **kwargs: Any) -> Image.Image:
        limits = kwargs["image_max_pixels"], kwargs["image_min_pixels"]
        return prepare_crop(image, ImagePolicy(self.policy.stage, self.policy.aspect, *limits))

    def _regularize_images(self, images: list[Any], **kwargs: Any) -> Any:
        results: list[Image.Image] = []
        for image in images:
            opened = open_image(image)
            _check_size(image, opened.size)
            try:
                opened.load()  # here, where the file's name is known, and not inside the image processor
            except DAMAGE as error:
                raise DataError(f"Image {_describe(image)} is damaged: {error}") from None
            results.append(self._preprocess_image(opened, **kwargs))
        return {"images": results}

    def _get_mm_token_metadata(
        self, images: list[Any], videos: list[Any], audios: list[Any], processor: Any
    ) -> dict[str, Any] | None:
        if videos or audios:
            return super()._get_mm_token_metadata(images, videos, audios, processor)
        if not images:
            return {}
        policy = ImagePolicy(
            self.policy.stage,
            self.policy.aspect,
            getattr(processor, "image_max_pixels", DEFAULT_IMAGE_MAX_PIXELS),
            getattr(processor, "image_min_pixels", DEFAULT_IMAGE_MIN_PIXELS),
        )
        geometry = read_geometry(processor.image_processor)
        grids = [count_grid(*read_size(image), policy, geometry) for image in images]
        return {"image_grid_thw": torch.tensor(grids, dtype=torch.long)}


def read_geometry(image_processor: Any) -> PatchGeometry:
    """Return the numbers of a Qwen2-VL image processor that decide the token count."""
    size: Any = image_processor.size  # a dict or a SizeDict, both of which have these keys
    return PatchGeometry(
        image_processor.patch_size, image_processor.merge_size, size["shortest_edge"], size["longest_edge"]
    )


def register_plugin(module: ModuleType) -> None:
    """Register the plugin inside ``llamafactory.data.mm_plugin``, after checking what it overrides."""
    get_function(module, "Qwen2VLPlugin._get_mm_token_metadata")
    get_function(module, "Qwen2VLPlugin._preprocess_image")
    get_function(module, "MMPluginMixin._regularize_images")
    get_upstream(module, "register_mm_plugin")(PLUGIN_NAME, ChatReIDPlugin)
