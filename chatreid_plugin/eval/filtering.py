"""The baseline filter: which gallery images are worth the model's time, and in what order the rest follows.

Second step of an evaluation (paper section 4.1): features of a simple baseline, cosine similarity, a threshold
``tau``, a cap ``top_k`` and a floor. Where the filter loses a match no re-ranker can win it back, so recall and
ceiling are reported.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from tqdm import tqdm

from ..crops import open_crop
from ..errors import ConfigError, DataError
from ..eval_settings import EvalSettings
from ..records import ImageRecord
from .external import list_image_names, read_features
from .metrics import IgnoreMask
from .ties import IntArray


FloatArray = npt.NDArray[np.float32]

STRIPES = 6
COLOUR_SIZE = (48, 128)  # width, height
HUE_BINS, SATURATION_BINS, VALUE_BINS = 12, 4, 8
SIMILARITY_CHUNK = 64
CROP_SIZE = (128, 256)  # width, height
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)
CROPS_PER_BATCH = 64


def _normalise(features: npt.NDArray[Any]) -> FloatArray:
    features = features.astype(np.float32)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(norms, np.float32(1e-12))


def describe_colours(image: Image.Image) -> FloatArray:
    """Return HSV colour histograms of six horizontal stripes, (6 * 56,), to be L2-normalised.

    Stripes after Gray and Tao, "Viewpoint Invariant Pedestrian Recognition with an Ensemble of Localized Features"
    (ELF, 2008). Hue and saturation are counted together, each pixel weighted by its saturation and value, since the
    hue of grey and black is noise; value is equalised, since cameras differ in exposure; the middle columns weigh
    more, since the person stands there. Square roots make the dot product the Bhattacharyya coefficient.
    """
    resized = image.resize(COLOUR_SIZE, Image.Resampling.BILINEAR).convert("HSV")
    pixels = np.asarray(resized, dtype=np.int64)
    brightness = np.asarray(ImageOps.equalize(resized.getchannel("V")), dtype=np.int64)
    columns = np.linspace(-1.0, 1.0, COLOUR_SIZE[0])
    weights = np.broadcast_to(np.exp(-4.0 * columns**2), pixels.shape[:2])
    hue, saturation, value = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    hue_bins = (hue * HUE_BINS + 128) // 256 % HUE_BINS  # pure red, green and blue lie mid-bin, not on an edge
    chroma_bins = hue_bins * SATURATION_BINS + saturation * SATURATION_BINS // 256
    value_bins = brightness * VALUE_BINS // 256
    parts: list[npt.NDArray[Any]] = []
    for rows in np.array_split(np.arange(COLOUR_SIZE[1]), STRIPES):
        weight = weights[rows].ravel()
        chroma = weight * (saturation[rows] * value[rows]).ravel() / 255.0**2
        parts.append(np.bincount(chroma_bins[rows].ravel(), chroma, HUE_BINS * SATURATION_BINS))
        parts.append(np.bincount(value_bins[rows].ravel(), weight, VALUE_BINS))
    return np.sqrt(np.concatenate(parts)).astype(np.float32)


def _extract_colour(records: Sequence[ImageRecord], image_root: Path) -> FloatArray:
    progress = tqdm(records, desc="colour features", unit="image")
    return np.stack([describe_colours(open_crop(image_root / record.path)) for record in progress])


def _read_npz(records: Sequence[ImageRecord], path: Path) -> FloatArray:
    """Return the file's features of the records, (N, D)."""
    return read_features(path, [], [list_image_names(record) for record in records])[1]


def _extract_torchvision(
    records: Sequence[ImageRecord], image_root: Path, weights: Path, device_name: str
) -> FloatArray:
    """Return pooled ResNet-50 features (N, 2048) of 256x128 crops, ImageNet normalisation."""
    try:
        import torch
        from torchvision.models import resnet50
    except ImportError as error:
        raise ConfigError(f"filter: torchvision needs torch and torchvision ({error}); use filter=colour.") from None
    if device_name == "auto":
        device_name = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = resnet50(weights=None)
    model.fc = torch.nn.Identity()
    try:
        state: dict[str, Any] = torch.load(weights, map_location="cpu", weights_only=True)
        state = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
        model.load_state_dict(state)
    except (OSError, RuntimeError, AttributeError, ValueError) as error:
        raise DataError(f"{weights} is no state_dict of torchvision's ResNet-50: {error}") from None
    model.eval().to(device_name)
    mean = np.array(IMAGENET_MEAN, dtype=np.float32)
    deviation = np.array(IMAGENET_DEVIATION, dtype=np.float32)
    batches: list[FloatArray] = []
    with tqdm(total=len(records), desc="ResNet-50 features", unit="image") as progress, torch.inference_mode():
        for start in range(0, len(records), CROPS_PER_BATCH):
            images = [open_crop(image_root / record.path) for record in records[start : start + CROPS_PER_BATCH]]
            pixels = np.stack([np.asarray(image.resize(CROP_SIZE, Image.Resampling.BILINEAR)) for image in images])
            inputs = torch.tensor((pixels.astype(np.float32) / 255.0 - mean) / deviation).permute(0, 3, 1, 2)
            batches.append(model(inputs.to(device_name)).float().cpu().numpy())
            progress.update(len(images))
    return np.concatenate(batches)


def extract_features(records: Sequence[ImageRecord], image_root: Path, settings: EvalSettings) -> FloatArray:
    """Return the filter's features of the records, (N, D), L2-normalised.

    Raises:
        ConfigError: ``filter: none``, which has no features, or a source that is not installed.
        DataError: an unreadable image, a feature file that lacks an image, or features that are not finite.
    """
    if settings.filter == "colour":
        features = _extract_colour(records, image_root)
    elif settings.filter == "npz" and settings.filter_features is not None:
        features = _read_npz(records, settings.filter_features)
    elif settings.filter == "torchvision" and settings.filter_weights is not None:
        features = _extract_torchvision(records, image_root, settings.filter_weights, settings.device)
    else:
        raise ConfigError(f"filter: {settings.filter} has no features; choose colour, npz or torchvision.")
    if not np.isfinite(features).all():
        wrong = records[int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])].path
        raise DataError(f"filter: {settings.filter} gives NaN or infinite features, first for {wrong}.")
    return _normalise(features)


def iterate_similarities(query_features: FloatArray, gallery_features: FloatArray) -> Iterator[FloatArray]:
    """Yield for each query its cosine similarity to the gallery, (G,); a chunk of queries in memory at a time."""
    for start in range(0, len(query_features), SIMILARITY_CHUNK):
        yield from query_features[start : start + SIMILARITY_CHUNK] @ gallery_features.T


def filter_gallery(
    query_features: FloatArray,
    gallery_features: FloatArray,
    find_ignored: IgnoreMask,
    tau: float,
    top_k: int | None,
    floor: int,
) -> list[IntArray]:
    """Return for each query the gallery indices to score, most similar first; equal similarities in gallery order.

    Kept is every image of similarity ``tau`` or more, but no fewer than the ``floor`` best and no more than the
    ``top_k`` best (the cap wins, as it bounds the cost). Ignored images are removed first.

    Args:
        query_features: (Q, D) L2-normalised.
        gallery_features: (G, D) L2-normalised.
        find_ignored: query index -> boolean mask (G,).
        tau: cosine similarity; -1 keeps all.
        top_k: at most this many; None: no cap.
        floor: at least this many, as far as the gallery has them.
    """
    kept: list[IntArray] = []
    for query, similarities in enumerate(iterate_similarities(query_features, gallery_features)):
        allowed = np.flatnonzero(~find_ignored(query))
        count = max(int(np.count_nonzero(similarities[allowed] >= tau)), floor)
        kept.append(_take_best(allowed, similarities[allowed], count if top_k is None else min(count, top_k)))
    return kept


def _take_best(indices: IntArray, similarities: FloatArray, count: int) -> IntArray:
    """Return the ``count`` indices of largest similarity, largest first, equal ones in the order given.

    Only what is taken is sorted: of equal similarities at the border the first ones are in.
    """
    if 0 < count < len(indices):
        border = np.partition(similarities, -count)[-count]
        above, tied = np.flatnonzero(similarities > border), np.flatnonzero(similarities == border)
        chosen = np.sort(np.concatenate([above, tied[: count - len(above)]]))
        indices, similarities = indices[chosen], similarities[chosen]
    return indices[np.argsort(-similarities, kind="stable")][:count]
