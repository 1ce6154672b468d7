"""One builder a task: a draw from the image pool becomes an instruction record."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..config import BuildSettings
from ..records import Answer, Attribute, ImageReference, Instruction
from ..tasks import ORDINALS, TASKS
from .sampler import ImagePool, draw_gallery


# Tokens kept free for the words of a record; the longest wording of the table with a 60-word caption needs fewer.
TEXT_TOKENS = 256
# <|vision_start|> and <|vision_end|> around each image, and the letter before it.
TOKENS_AROUND_IMAGE = 5


@dataclass(frozen=True, slots=True)
class Draft:
    """What a builder decides; id, data set and wording are added by ``build_record``."""

    images: Sequence[int]
    query_images: int
    answer: Answer
    captions: tuple[str, ...] = ()
    attributes: tuple[Attribute, ...] = ()


Builder = Callable[[ImagePool, np.random.Generator, BuildSettings], Draft]


def _choose(rng: np.random.Generator, options: Sequence[int] | np.ndarray) -> int:
    return int(options[int(rng.integers(len(options)))])


def _draw_caption(pool: ImagePool, rng: np.random.Generator, image: int) -> str:
    captions = pool.records[image].captions
    return captions[int(rng.integers(len(captions)))]


def _list_attributes(pool: ImagePool, image: int, position: int) -> tuple[Attribute, ...]:
    return tuple(Attribute(position, name, value) for name, value in pool.records[image].attributes.items())


def _build_captioning(pool: ImagePool, rng: np.random.Generator, settings: BuildSettings) -> Draft:
    image = _choose(rng, pool.captioned)
    return Draft([image], 1, Answer(text=_draw_caption(pool, rng, image)))


def _build_image_pair(pool: ImagePool, rng: np.random.Generator, settings: BuildSettings) -> Draft:
    # P(yes) = 0.5 (paper section 3.1.2); the order is random, since the question is symmetric.
    match = bool(rng.random() < 0.5)
    query = pool.draw_query(rng, 1)
    if match:
        other = pool.draw_positives(rng, query, 1)
    else:
        other = pool.draw_negatives(rng, query, 1, settings.gallery.hard_negatives)
    pair = [query, other[0]]
    return Draft(pair if rng.random() < 0.5 else pair[::-1], 2, Answer(match=match))


def _build_gallery(pool: ImagePool, rng: np.random.Generator, settings: BuildSettings, smallest: int) -> Draft:
    budget = settings.cutoff_len - TEXT_TOKENS - TOKENS_AROUND_IMAGE * (settings.gallery.max_size + 1)
    query, gallery, matches = draw_gallery(pool, rng, settings.gallery, budget, smallest)
    return Draft([query, *gallery], 1, Answer(tuple(matches)))


def _build_many_to_many(pool: ImagePool, rng: np.random.Generator, settings: BuildSettings) -> Draft:
    return _build_gallery(pool, rng, settings, 2)


def _build_standard_reid(pool: ImagePool, rng: np.random.Generator, settings: BuildSettings) -> Draft:
    return _build_gallery(pool, rng, settings, 1)


def _build_text_pair(pool: ImagePool, rng: np.random.Generator, settings: BuildSettings) -> Draft:
    match = bool(rng.random() < 0.5)
    image = _choose(rng, pool.captioned)
    described = image if match else pool.draw_unlike(rng, image, 1, pool.captioned)[0]
    return Draft([image], 1, Answer(match=match), (_draw_caption(pool, rng, described),))


def _build_caption_choice(pool: ImagePool, rng: np.random.Generator, settings: BuildSettings) -> Draft:
    image = _choose(rng, pool.captioned)
    options = int(rng.integers(2, min(settings.gallery.max_size, len(ORDINALS)) + 1))
    images = [image, *pool.draw_unlike(rng, image, options - 1, pool.captioned)]
    order = rng.permutation(len(images)).tolist()
    captions = tuple(_draw_caption(pool, rng, images[i]) for i in order)
    return Draft([image], 1, Answer((order.index(0),)), captions)


def _build_image_choice(pool: ImagePool, rng: np.random.Generator, settings: BuildSettings) -> Draft:
    image = _choose(rng, pool.captioned)
    size = int(rng.integers(settings.gallery.min_size, settings.gallery.max_size + 1))
    images = [image, *pool.draw_unlike(rng, image, size - 1, np.arange(len(pool.records)))]
    budget = settings.cutoff_len - TEXT_TOKENS - TOKENS_AROUND_IMAGE * size
    kept = max(1, int(np.searchsorted(np.cumsum(pool.tokens[images]), budget, side="right")))
    order = rng.permutation(kept).tolist()
    caption = _draw_caption(pool, rng, image)
    return Draft([images[i] for i in order], 0, Answer((order.index(0),)), (caption,))


def _build_comparison(pool: ImagePool, rng: np.random.Generator, settings: BuildSettings) -> Draft:
    # Two of three pairs are different people, else there would be no differences to describe.
    image = _choose(rng, pool.attributed)
    same = pool.list_positives(image)
    if len(same) and rng.random() < 1 / 3:
        other = _choose(rng, same)
    else:
        other = pool.draw_unlike(rng, image, 1, pool.attributed)[0]
    attributes = _list_attributes(pool, image, 0) + _list_attributes(pool, other, 1)
    return Draft([image, other], 2, Answer(), attributes=attributes)


def _build_prediction(pool: ImagePool, rng: np.random.Generator, settings: BuildSettings) -> Draft:
    image = _choose(rng, pool.attributed)
    return Draft([image], 1, Answer(), attributes=_list_attributes(pool, image, 0))


BUILDERS: dict[str, Builder] = {
    "image_captioning": _build_captioning,
    "image_to_image_one_to_one": _build_image_pair,
    "image_to_image_many_to_many": _build_many_to_many,
    "text_to_image_one_to_one": _build_text_pair,
    "text_to_image_many_to_one": _build_caption_choice,
    "text_to_image_one_to_many": _build_image_choice,
    "attribute_comparison": _build_comparison,
    "attribute_prediction": _build_prediction,
    "standard_reid": _build_standard_reid,
}


def explain_missing(task: str, pool: ImagePool) -> str | None:
    """Return why this pool cannot give records of the task, or None if it can."""
    if task in ("image_captioning",) or task.startswith("text_to_image"):
        return None if len(pool.captioned) > 1 else "no captions"
    if task.startswith("attribute"):
        return None if len(pool.attributed) > 1 else "no attributes"
    if not len(pool.positives) or pool.positives.max() == 0:
        return "no identity seen by two cameras"
    return None


def build_record(
    task: str, pool: ImagePool, rng: np.random.Generator, settings: BuildSettings, record_id: str
) -> Instruction:
    """Draw one record of a task from a pool."""
    draft = BUILDERS[task](pool, rng, settings)
    images = [pool.records[i] for i in draft.images]
    return Instruction(
        id=record_id,
        task=task,
        images=tuple(ImageReference(image.path, image.width, image.height) for image in images),
        query_images=draft.query_images,
        answer=draft.answer,
        captions=draft.captions,
        attributes=draft.attributes,
        dataset=images[0].dataset,
        variant=int(rng.integers(min(settings.prompt_variants, len(TASKS[task].prompts)))),
    )
