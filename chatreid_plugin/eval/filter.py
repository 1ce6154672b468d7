"""The baseline filter: which gallery images are worth the model's time, and in what order the rest follows.

Second step of an evaluation (paper section 4.1): features of a simple baseline, cosine similarity, a threshold
``tau``, a cap ``top_k`` and a floor. Where the filter loses a match no re-ranker can win it back, so recall and
ceiling are reported.

Where images of equal similarity stand on both sides of the cut of ``top_k`` or ``floor``, the first ones in the
gallery's order are kept. What the model is asked about, and so the result, then depends on that order, unlike all that
``metrics`` does with ties. It takes duplicate images or coarse features; the report says how often it happened.

The features are colours, a network's pooled output, those of the scoring model itself, or another program's in a file
(``filter: npz``). ``clip`` alone reads words as well as images, so it can filter for queries in words.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from tqdm import tqdm

from ..archives import BoolArray, IntArray, Names, ScoreArray, normalise, read_features
from ..checkpoints import guard_loading
from ..datasets.benchmark import Benchmark, Query
from ..datasets.matching import IgnoreMask
from ..errors import ConfigError, DataError
from ..pixels import open_crop
from ..records import ImageRecord
from .distributed import Processes
from .settings import FilterSettings


SIMILARITY_CHUNK = 64
Item = ImageRecord | str  # an image, or words that ask
PoolImages = Callable[[Sequence[ImageRecord]], ScoreArray]
STRIPES = 6
COLOUR_SIZE = (48, 128)  # width, height
HUE_BINS, SATURATION_BINS, VALUE_BINS = 12, 4, 8
CROP_SIZE = (128, 256)  # width, height
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)
ITEMS_PER_BATCH = 64


def filter_gallery(
    query_features: ScoreArray,
    gallery_features: ScoreArray,
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
        tau: cosine similarity; -1 or less keeps all.
        top_k: at most this many; None: no cap.
        floor: at least this many, as far as the gallery has them.
    """
    rows = enumerate(iterate_similarities(query_features, gallery_features))
    return [keep_similar(row, find_ignored(query), tau, top_k, floor) for query, row in rows]


def keep_similar(similarities: ScoreArray, ignored: BoolArray, tau: float, top_k: int | None, floor: int) -> IntArray:
    """Return what ``filter_gallery`` keeps for one query, by its similarities to the gallery (G,)."""
    allowed = np.flatnonzero(~ignored)
    # In float32 opposite vectors may have a similarity just below -1.
    similar = len(allowed) if tau <= -1 else int(np.count_nonzero(similarities[allowed] >= tau))
    count = max(similar, floor)
    return _take_best(allowed, similarities[allowed], count if top_k is None else min(count, top_k))


def _take_best(indices: IntArray, similarities: ScoreArray, count: int) -> IntArray:
    """Return the ``count`` indices of largest similarity, largest first, equal ones in the order given.

    Only what is taken is sorted: of equal similarities at the border the first ones are in.
    """
    if 0 < count < len(indices):
        border = np.partition(similarities, -count)[-count]
        above, tied = np.flatnonzero(similarities > border), np.flatnonzero(similarities == border)
        chosen = np.sort(np.concatenate([above, tied[: count - len(above)]]))
        indices, similarities = indices[chosen], similarities[chosen]
    return indices[np.argsort(-similarities, kind="stable")][:count]


def is_cut_through_ties(similarities: ScoreArray, kept: IntArray, ignored: BoolArray) -> bool:
    """Return whether the filter left out an image (of G) that is as similar as one it kept."""
    if not len(kept):
        return False
    left_out = ~ignored
    left_out[kept] = False
    return bool((similarities[left_out] == similarities[kept].min()).any())


def iterate_similarities(query_features: ScoreArray, gallery_features: ScoreArray) -> Iterator[ScoreArray]:
    """Yield for each query its cosine similarity to the gallery, (G,); a chunk of queries in memory at a time.

    Equal gallery rows are multiplied once: a matrix product may differ in the last digit from column to column, which
    would make an order of what is tied.
    """
    firsts, places = np.unique(number_distinct(gallery_features), return_inverse=True)
    repeats = len(firsts) < len(gallery_features)
    distinct = gallery_features[firsts] if repeats else gallery_features
    for start in range(0, len(query_features), SIMILARITY_CHUNK):
        similarities = query_features[start : start + SIMILARITY_CHUNK] @ distinct.T
        yield from similarities[:, places] if repeats else similarities


def number_distinct(features: Iterable[ScoreArray]) -> IntArray:
    """Return for each of N vectors (D,) the index of the first one that equals it, (N,)."""
    firsts: dict[bytes, int] = {}
    # Added to zero, so that -0.0 and 0.0 are the same bytes.
    keys = (hashlib.blake2b((vector + 0.0).tobytes(), digest_size=16).digest() for vector in features)
    return np.array([firsts.setdefault(key, place) for place, key in enumerate(keys)], dtype=np.int64)


def extract_benchmark_features(
    own: FilterSettings,
    device: str,
    benchmark: Benchmark,
    processes: Processes,
    pool_images: PoolImages | None = None,
) -> tuple[ScoreArray, ScoreArray]:
    """Return the filter's features (Q, D) of a benchmark's queries and (G, D) of its gallery, L2-normalised.

    Several processes share the work, and all get all of it. What is query and gallery image is computed once.

    Raises:
        ConfigError, DataError: see ``extract_features`` and ``read_benchmark_features``.
    """
    if own.source == "npz" and own.features is not None:
        return read_benchmark_features(own.features, benchmark)
    asked = [query.words if query.image is None else query.image for query in benchmark.queries]
    ranked = [record.captions[0] if benchmark.ranks_captions else record for record in benchmark.gallery]
    sides = [[_name_item(item) for item in side] for side in (asked, ranked)]
    items = dict(zip([*sides[0], *sides[1]], [*asked, *ranked], strict=True))
    extract = partial(
        extract_features, image_root=benchmark.image_root, own=own, device=device, pool_images=pool_images
    )
    found = _share_out(extract, list(items.values()), processes)
    rows = {key: row for row, key in enumerate(items)}
    queries, gallery = ([rows[key] for key in side] for side in sides)
    return found[queries], found[gallery]


def _name_item(item: Item) -> tuple[str, str]:
    return ("words", item) if isinstance(item, str) else ("image", item.image_id)


def _share_out(
    extract: Callable[[Sequence[Item]], ScoreArray], items: Sequence[Item], processes: Processes
) -> ScoreArray:
    batches = form_batches(items)
    share = processes.take_share(batches) if len(batches) >= processes.count else batches
    own = [items[place] for batch in share for place in batch]
    found = np.concatenate(processes.gather(extract(own)))
    features = np.empty((len(items), found.shape[1]), dtype=np.float32)
    features[np.concatenate(batches)] = found[: len(items)]  # of fewer batches than processes everyone took all
    return features


def form_batches(items: Sequence[Item]) -> list[list[int]]:
    """Return the places of the items that a network computes at once: 64 words or 64 images, in the order given.

    The last bits of a result depend on what else is in its batch. So processes share out whole batches, of which each
    makes the same again, and any number of them gives the same features.
    """
    kinds = [[place for place, item in enumerate(items) if isinstance(item, str) is words] for words in (True, False)]
    return [own[start : start + ITEMS_PER_BATCH] for own in kinds for start in range(0, len(own), ITEMS_PER_BATCH)]


def extract_features(
    items: Sequence[Item],
    image_root: Path,
    own: FilterSettings,
    device: str = "auto",
    pool_images: PoolImages | None = None,
) -> ScoreArray:
    """Return the filter's features of images and words, (N, D), L2-normalised.

    Args:
        items: images, and words for ``filter: clip``.
        image_root: where the images are.
        own: the evaluation's section ``filter``.
        device: where a network runs, as ``model.device``.
        pool_images: the scoring model's own features, for ``filter: vlm``.

    Raises:
        ConfigError: ``filter: none`` or ``npz``, which compute no features; words for a source that compares images;
            or a source that is not installed or cannot be loaded.
        DataError: an unreadable image, or features that are not finite.
    """
    source = own.source
    if not items:
        raise ConfigError(f"filter.source: {source} has nothing to compare.")
    if source == "clip":
        features = _extract_clip(items, image_root, own, device)
    else:
        records = [item for item in items if isinstance(item, ImageRecord)]
        if len(records) < len(items):
            raise ConfigError(
                f"filter.source: {source} compares images, and a query asks in words. Set filter.source: none, "
                "clip, or npz with features of both."
            )
        if source == "colour":
            features = _extract_colour(records, image_root)
        elif source == "torchvision":
            features = _extract_torchvision(records, image_root, own, device)
        elif source == "timm":
            features = _extract_timm(records, image_root, own, device)
        elif source == "vlm" and pool_images is not None:
            features = pool_images(records)
        else:
            raise ConfigError(f"filter.source: {source} computes no features; choose another.")
    if not np.isfinite(features).all():
        wrong = items[int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])]
        label = wrong if isinstance(wrong, str) else wrong.path
        raise DataError(f"filter.source: {source} gives NaN or infinite features, first for {label}.")
    return normalise(features)


def describe_colours(image: Image.Image) -> ScoreArray:
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


def _extract_colour(records: Sequence[ImageRecord], image_root: Path) -> ScoreArray:
    progress = tqdm(records, desc="colour features", unit="image")
    return np.stack([describe_colours(open_crop(image_root / record.path)) for record in progress])


def _load_weights(model: Any, weights: Path, name: str) -> None:
    """Load a state_dict (.pth or .safetensors) into a network without its classifier, whose weights are dropped."""
    import torch

    try:
        if weights.suffix == ".safetensors":
            state: Any = import_module("safetensors.torch").load_file(weights)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        wanted = model.state_dict()
        model.load_state_dict({key: tensor for key, tensor in state.items() if key in wanted})
    # torch.load raises what its unpickler meets, safetensors an error class of its own.
    except Exception as error:
        raise DataError(f"{weights} is no state_dict of {name}: {error}") from None


def _run(items: Sequence[Any], compute: Callable[[Sequence[Any]], Any], name: str) -> ScoreArray:
    """Return what a network computes of each item, (N, D), batch by batch."""
    import torch

    batches, found = form_batches(items), list[ScoreArray]()
    with tqdm(total=len(items), desc=f"{name} features", unit="item") as progress, torch.inference_mode():
        for batch in batches:
            found.append(compute([items[place] for place in batch]).float().cpu().numpy())
            progress.update(len(batch))
    features = np.empty((len(items), found[0].shape[1]), dtype=np.float32)
    features[np.concatenate(batches)] = np.concatenate(found)
    return features


def _extract_pooled(
    records: Sequence[ImageRecord],
    image_root: Path,
    model: Any,
    device: str,
    size: tuple[int, int],
    mean: Sequence[float],
    deviation: Sequence[float],
    name: str,
) -> ScoreArray:
    """Return a network's output (N, D) for whole crops resized to ``size`` (width, height)."""
    import torch

    model.eval().to(device)
    shift, scale = np.array(mean, dtype=np.float32), np.array(deviation, dtype=np.float32)

    def compute(batch: Sequence[ImageRecord]) -> Any:
        images = [open_crop(image_root / record.path).resize(size, Image.Resampling.BILINEAR) for record in batch]
        pixels = np.stack([np.asarray(image) for image in images]).astype(np.float32)
        inputs = torch.tensor((pixels / np.float32(255.0) - shift) / scale).permute(0, 3, 1, 2)
        return model(inputs.to(device))

    return _run(records, compute, name)


def _extract_torchvision(
    records: Sequence[ImageRecord], image_root: Path, own: FilterSettings, device: str
) -> ScoreArray:
    """Return pooled ResNet-50 features (N, 2048) of 256x128 crops, ImageNet normalisation."""
    try:
        import torch
        from torchvision.models import resnet50
    except ImportError as error:
        raise ConfigError(f"filter.source: torchvision needs torch and torchvision ({error}); use colour.") from None
    from .backends.checkpoint import pick_device

    model: Any = resnet50(weights=None)
    model.fc = torch.nn.Identity()
    _load_weights(model, Path(str(own.weights)), "torchvision's ResNet-50")
    look = CROP_SIZE, IMAGENET_MEAN, IMAGENET_DEVIATION
    return _extract_pooled(records, image_root, model, pick_device(device), *look, "ResNet-50")


def _extract_timm(records: Sequence[ImageRecord], image_root: Path, own: FilterSettings, device: str) -> ScoreArray:
    """Return pooled features (N, D) of a timm model, at the size and normalisation that timm states for it."""
    try:
        timm: Any = import_module("timm")
    except ImportError as error:
        raise ConfigError(
            f"filter.source: timm needs the package timm ({error}); run `pip install chatreid-plugin[baselines]`."
        ) from None
    from .backends.checkpoint import pick_device

    name = str(own.model)
    try:
        model = timm.create_model(name, pretrained=False, num_classes=0)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"filter.model: timm cannot make {name}: {error}") from None
    _load_weights(model, Path(str(own.weights)), f"timm's {name}")
    look = timm.data.resolve_model_data_config(model)
    size = look["input_size"][2], look["input_size"][1]
    device = pick_device(device)
    return _extract_pooled(records, image_root, model, device, size, look["mean"], look["std"], name)


def _extract_clip(items: Sequence[Item], image_root: Path, own: FilterSettings, device: str) -> ScoreArray:
    """Return features (N, D) of images and words in the one space of a CLIP or SigLIP model."""
    from transformers import AutoModel, AutoProcessor

    from .backends.checkpoint import LOADING_ERRORS, check_name, explain_failure, pick_device, refuse_misfits

    folder = str(own.model)
    check_name("filter.model", folder)
    guard_loading(folder)
    try:
        model, loaded = AutoModel.from_pretrained(folder, output_loading_info=True, trust_remote_code=False)
        processor: Any = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except LOADING_ERRORS as error:
        why = explain_failure(folder, error)
        raise ConfigError(f"filter.model: {folder} cannot be loaded as CLIP or SigLIP: {why}") from None
    if not (hasattr(model, "get_text_features") and hasattr(model, "get_image_features")):
        raise ConfigError(f"filter.model: {folder} is a {model.config.model_type}, which is no CLIP or SigLIP.")
    refuse_misfits("filter.model", folder, loaded)
    model.eval().to(pick_device(device))
    size = model.config.vision_config.image_size
    length = model.config.text_config.max_position_embeddings

    def compute_words(batch: Sequence[str]) -> Any:
        # SigLIP has only seen texts padded to their full length; to CLIP it makes no difference.
        kind: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": length}
        return model.get_text_features(
            **processor.tokenizer(list(batch), return_tensors="pt", **kind).to(model.device)
        )

    def compute_images(batch: Sequence[ImageRecord]) -> Any:
        # Squeezed to the model's square, since its processor would cut off head and feet.
        images = [open_crop(image_root / record.path).resize((size, size)) for record in batch]
        inputs = processor.image_processor(images=images, return_tensors="pt").to(model.device)
        return model.get_image_features(pixel_values=inputs["pixel_values"])

    def compute(batch: Sequence[Any]) -> Any:
        found = compute_words(batch) if isinstance(batch[0], str) else compute_images(batch)
        return getattr(found, "pooler_output", found)  # transformers 5 wraps what 4 returned

    return _run(items, compute, "CLIP")


def list_names(benchmark: Benchmark) -> tuple[list[Names], list[Names]]:
    """Return what a file may call the queries and the gallery; captions also by the path of their image."""
    paths = {record.image_id: record.path for record in benchmark.gallery}
    paths |= {query.image.image_id: query.image.path for query in benchmark.queries if query.image is not None}
    queries: list[Names] = []
    for query in benchmark.queries:
        image, mark, number = query.query_id.rpartition("#")
        caption = (f"{paths[image]}#{number}",) if mark and image in paths else ()
        queries.append((*list_query_names(query), *caption))
    if not benchmark.ranks_captions:
        return queries, [list_image_names(record) for record in benchmark.gallery]
    numbers = [record.image_id.rpartition("#")[2] for record in benchmark.gallery]
    pairs = zip(benchmark.gallery, numbers, strict=True)
    return queries, [(f"{record.path}#{number}", record.image_id) for record, number in pairs]


def list_query_names(query: Query) -> Names:
    """Return what a file may call the query: its id without the data set, which mostly is a path, its id, its path."""
    names = [query.query_id.partition("/")[2] or query.query_id, query.query_id]
    if query.image is not None and query.query_id == query.image.image_id:
        names.append(query.image.path)
    return tuple(names)


def list_image_names(record: ImageRecord) -> Names:
    """Return what a file may call a gallery image: its path or its id."""
    return record.path, record.image_id


def read_benchmark_features(path: Path, benchmark: Benchmark) -> tuple[ScoreArray, ScoreArray]:
    """Return the L2-normalised features (Q, D) of the benchmark's queries and (G, D) of its gallery.

    Raises:
        DataError: see ``read_features``.
    """
    names = list_names(benchmark)
    queries, gallery = read_features(path, list(zip(("queries", "gallery images"), names, strict=True)))
    return normalise(queries), normalise(gallery)
