"""One builder a task: a draw from the image pool becomes an instruction record."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..config import BuildSettings
from ..errors import DataError
from ..records import Answer, Attribute, ImageReference, Instruction
from ..tasks import ORDINALS, TASKS
from .sampler import ImagePool, Indices, draw_gallery


# Tokens kept free for the chat frame, the wording and the answer; the longest of the table need fewer, captions and
# attributes not counted.
TEXT_TOKENS = 256
# English takes about 4.5 characters a token; fewer here, so that a caption is not underestimated.
CHARACTERS_PER_TOKEN = 3
# How often an image is drawn again when nobody else looks different; most data sets never need a second time.
ATTEMPTS = 100
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


def _count_text_tokens(captions: Sequence[str]) -> int:
    return sum(len(caption) // CHARACTERS_PER_TOKEN + 1 for caption in captions)


def _draw_with_others(
    pool: ImagePool, rng: np.random.Generator, count: int, among: Indices, others: Indices
) -> tuple[int, list[int]]:
    """Return an image and up to ``count``, but at least one, images of people who look different.

    Raises:
        DataError: nobody looks different from anybody drawn.
    """
    for _ in range(ATTEMPTS):
        image = _choose(rng, among)
        unlike = pool.draw_unlike(rng, image, count, others)
        if unlike:
            return image, unlike
    raise DataError(
        f"Source {pool.records[0].dataset}: {ATTEMPTS} images drawn, and no other person has other attributes or "
        "captions. Describe the people in more detail, or leave text and attribute tasks out of stage2_ratios."
    )


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
    image, others = _draw_with_others(pool, rng, 1, pool.captioned, pool.captioned)
    described = image if match else others[0]
    return Draft([image], 1, Answer(match=match), (_draw_caption(pool, rng, described),))


def _build_caption_choice(pool: ImagePool, rng: np.random.Generator, settings: BuildSettings) -> Draft:
    options = int(rng.integers(2, min(settings.gallery.max_size, len(ORDINALS)) + 1))
    image, others = _draw_with_others(pool, rng, options - 1, pool.captioned, pool.captioned)
    images = [image, *others]
    order = rng.permutation(len(images)).tolist()
    captions = tuple(_draw_caption(pool, rng, images[i]) for i in order)
    return Draft([image], 1, Answer((order.index(0),)), captions)


def _build_image_choice(pool: ImagePool, rng: np.random.Generator, settings: BuildSettings) -> Draft:
    size = int(rng.integers(settings.gallery.min_size, settings.gallery.max_size + 1))
    image, others = _draw_with_others(pool, rng, size - 1, pool.captioned, np.arange(len(pool.records)))
    images = [image, *others]
    caption = _draw_caption(pool, rng, image)
    budget = settings.cutoff_len - TEXT_TOKENS - TOKENS_AROUND_IMAGE * size - _count_text_tokens([caption])
    # The match is first, so that it stays when images are left out; without room for it ``build_record`` refuses.
    kept = max(1, int(np.searchsorted(np.cumsum(pool.tokens[images]), budget, side="right")))
    order = rng.permutation(kept).tolist()
    return Draft([images[i] for i in order], 0, Answer((order.index(0),)), (caption,))


def _build_comparison(pool: ImagePool, rng: np.random.Generator, settings: BuildSettings) -> Draft:
    # Two of three pairs are different people, else there would be no differences to describe.
    image, others = _draw_with_others(pool, rng, 1, pool.attributed, pool.attributed)
    same = [int(i) for i in pool.list_positives(image) if pool.records[i].attributes]
    other = _choose(rng, same) if same and rng.random() < 1 / 3 else others[0]
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
    if task == "image_captioning":
        return None if len(pool.captioned) else "no captions"
    if task == "attribute_prediction":
        return None if len(pool.attributed) else "no attributes"
    if task.startswith(("text_to_image", "attribute")):
        described, missing = (
            (pool.attributed, "no attributes") if task.startswith("attribute") else (pool.captioned, "no captions")
        )
        if not len(described):
            return missing
        return None if pool.has_unlike(described) else "no two people who are described differently"
    if not len(pool.positives) or pool.positives.max() == 0:
        return "no identity seen by two cameras"
    return None if pool.count_people() > 1 else "only one identity"


def build_record(
    task: str, pool: ImagePool, rng: np.random.Generator, settings: BuildSettings, record_id: str
) -> Instruction:
    """Draw one record of a task from a pool.

    Raises:
        DataError: the record would be longer than ``cutoff_len``: cut off image tokens break training.
    """
    draft = BUILDERS[task](pool, rng, settings)
    texts = [*draft.captions, draft.answer.text or "", *(a.name + a.value for a in draft.attributes)]
    visual = int(pool.tokens[list(draft.images)].sum()) + TOKENS_AROUND_IMAGE * len(draft.images)
    if visual + TEXT_TOKENS + _count_text_tokens(texts) > settings.cutoff_len:
        raise DataError(
            f"Record {record_id}: {visual} tokens of {len(draft.images)} image(s) and about "
            f"{TEXT_TOKENS + _count_text_tokens(texts)} of text do not fit cutoff_len {settings.cutoff_len}. Raise it."
        )
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
