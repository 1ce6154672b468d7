"""One builder a task: a draw from the image pool becomes the draft of an instruction record."""

import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

from ..config import BuildSettings, Change
from ..errors import DataError
from ..tasks import ORDINALS
from .dialogues import draw_dialogue
from .pool import Draft, Numbers, pick
from .sampler import NO_MATCHES, ImagePool, build_attribute_query, draw_gallery, draw_gallery_size, draw_sizes


# Tokens kept free for the chat frame, the wording and the answer; the longest of the table need fewer, captions and
# attributes not counted.
TEXT_TOKENS = 256
# The same for each further turn of a dialogue: its wording, its frame, and up to 26 letters with commas.
TURN_TOKENS = 128
# How often an image is drawn again when nobody else looks different; most data sets never need a second time.
ATTEMPTS = 100
# <|vision_start|> and <|vision_end|> around each image, and the letter before it.
TOKENS_AROUND_IMAGE = 5

Builder = Callable[[ImagePool, random.Random, BuildSettings], Draft]


def _draw_caption(pool: ImagePool, rng: random.Random, image: int) -> int:
    return pick(rng, pool.list_captions(image))


def _place_attributes(pool: ImagePool, image: int, position: int) -> list[tuple[int, int]]:
    return [(position, number) for number in pool.list_attributes(image)]


def _draw_with_others(
    pool: ImagePool, rng: random.Random, count: int, among: Numbers, others: Numbers
) -> tuple[int, list[int]]:
    """Return an image and up to ``count``, but at least one, images of people who look different.

    Raises:
        DataError: nobody looks different from anybody drawn.
    """
    for _ in range(ATTEMPTS):
        image = pick(rng, among)
        unlike = pool.draw_unlike(rng, image, count, others)
        if unlike:
            return image, unlike
    raise _refuse_alike(pool)


def _refuse_alike(pool: ImagePool) -> DataError:
    return DataError(
        f"Source {pool.name}: {ATTEMPTS} images drawn, and no other person has other attributes or captions. "
        "Describe the people in more detail, or leave text and attribute tasks out of the ratios."
    )


def _fit_gallery(
    pool: ImagePool,
    rng: random.Random,
    settings: BuildSettings,
    images: Sequence[int],
    matches: int,
    taken: int,
    least: int = 1,
) -> tuple[list[int], list[int]]:
    """Return as many images as ``cutoff_len`` allows, shuffled, and where the first ``matches`` are.

    Args:
        pool: the images.
        rng: the source of randomness.
        settings: the recipe.
        images: the matches first, so that they stay when images are left out.
        matches: how many of them match.
        taken: tokens of the query.
        least: how many images stay in any case.
    """
    budget = settings.cutoff_len - TEXT_TOKENS - taken
    used = list(accumulate([pool.tokens[image] + TOKENS_AROUND_IMAGE for image in images]))
    # Without room for them ``build_draft`` refuses the record.
    kept = max(least, bisect_right(used, budget))
    order = rng.sample(range(kept), kept)
    return [images[i] for i in order], [place for place, i in enumerate(order) if i < matches]


def _build_captioning(pool: ImagePool, rng: random.Random, settings: BuildSettings) -> Draft:
    image = pick(rng, pool.captioned)
    return Draft([image], 1, text=_draw_caption(pool, rng, image))


def _build_image_pair(pool: ImagePool, rng: random.Random, settings: BuildSettings) -> Draft:
    # P(yes) = 0.5 (paper section 3.1.2); the order is random, since the question is symmetric.
    match = rng.random() < 0.5
    change = pool.draw_change(rng)
    query = pool.queries[change].draw(rng, 1)
    pair = [query, _draw_match_or_not(pool, rng, settings, query, change, match)]
    return Draft(pair if rng.random() < 0.5 else pair[::-1], 2, match=match)


def _draw_match_or_not(
    pool: ImagePool, rng: random.Random, settings: BuildSettings, query: int, change: Change, match: bool
) -> int:
    positives = pool.list_positives(query, change)
    if match:
        return pick(rng, positives)
    return pool.draw_negatives(rng, query, 1, settings.gallery.hard_negatives.share, positives)[0]


def _build_gallery(
    pool: ImagePool, rng: random.Random, settings: BuildSettings, smallest: int, change: Change | None
) -> Draft:
    query, matches, others = draw_gallery(pool, rng, settings.gallery, smallest, change or pool.draw_change(rng))
    taken = pool.tokens[query] + TOKENS_AROUND_IMAGE
    gallery, places = _fit_gallery(pool, rng, settings, matches + others, len(matches), taken)
    return Draft([query, *gallery], 1, places)


def _build_multimodal(pool: ImagePool, rng: random.Random, settings: BuildSettings) -> Draft:
    # An image and words that add to it (paper section 3.3, adaptive multi-modal retrieval).
    query, matches, others = draw_gallery(pool, rng, settings.gallery, 1, queries=pool.multimodal_queries)
    caption = pick(rng, pool.list_other_words(query))
    taken = pool.tokens[query] + TOKENS_AROUND_IMAGE + pool.caption_tokens[caption]
    gallery, places = _fit_gallery(pool, rng, settings, matches + others, len(matches), taken)
    return Draft([query, *gallery], 1, places, captions=[caption])


def _build_multimodal_pair(pool: ImagePool, rng: random.Random, settings: BuildSettings) -> Draft:
    match = rng.random() < 0.5
    query = pool.multimodal_queries.draw(rng, 1)
    caption = pick(rng, pool.list_other_words(query))
    other = _draw_match_or_not(pool, rng, settings, query, "camera", match)
    return Draft([query, other], 2, match=match, captions=[caption])


def _build_attribute_pair(pool: ImagePool, rng: random.Random, settings: BuildSettings) -> Draft:
    match = rng.random() < 0.5
    for _ in range(ATTEMPTS):
        query = build_attribute_query(pool, rng, 1, 1)
        if query.others:
            (image,) = query.matches if match else query.others
            return Draft([image], 1, match=match, attributes=[(-1, attribute) for attribute in query.asked])
    raise _refuse_alike(pool)


def _build_text_pair(pool: ImagePool, rng: random.Random, settings: BuildSettings) -> Draft:
    match = rng.random() < 0.5
    image, others = _draw_with_others(pool, rng, 1, pool.captioned, pool.captioned)
    described = image if match else others[0]
    return Draft([image], 1, match=match, captions=[_draw_caption(pool, rng, described)])


def _build_caption_choice(pool: ImagePool, rng: random.Random, settings: BuildSettings) -> Draft:
    options = rng.randint(2, min(settings.gallery.max_size, len(ORDINALS)))
    image, others = _draw_with_others(pool, rng, options - 1, pool.captioned, pool.captioned)
    images = [image, *others]
    order = rng.sample(range(len(images)), len(images))
    return Draft([image], 1, [order.index(0)], captions=[_draw_caption(pool, rng, images[i]) for i in order])


def _build_image_choice(pool: ImagePool, rng: random.Random, settings: BuildSettings) -> Draft:
    size = draw_gallery_size(rng, settings.gallery)
    image, others = _draw_with_others(pool, rng, size - 1, pool.captioned, pool.everything)
    caption = _draw_caption(pool, rng, image)
    images, matches = _fit_gallery(pool, rng, settings, [image, *others], 1, pool.caption_tokens[caption])
    return Draft(images, 0, matches, captions=[caption])


def _build_text_retrieval(pool: ImagePool, rng: random.Random, settings: BuildSettings) -> Draft:
    # As in the text-to-image benchmarks, every image of the described person is right, not the described one alone.
    size, number = draw_sizes(rng, settings.gallery, 1)
    described = pool.described_queries.draw(rng, number)
    same = [image for image in pool.people.list_alike(described) if image != described]
    matches = [described, *rng.sample(same, min(number - 1, len(same)))]
    others = pool.draw_unlike(rng, described, size - len(matches), pool.everything)
    caption = _draw_caption(pool, rng, described)
    taken = pool.caption_tokens[caption]
    images, places = _fit_gallery(pool, rng, settings, matches + others, len(matches), taken)
    return Draft(images, 0, places, captions=[caption])


def _build_attribute_retrieval(pool: ImagePool, rng: random.Random, settings: BuildSettings) -> Draft:
    size, number = draw_sizes(rng, settings.gallery, 1)
    query = build_attribute_query(pool, rng, number, size - number)
    taken = sum(pool.attribute_tokens[number] for number in query.asked)
    images, places = _fit_gallery(pool, rng, settings, query.matches + query.others, len(query.matches), taken)
    return Draft(images, 0, places, attributes=[(-1, attribute) for attribute in query.asked])


def _build_dialogue(pool: ImagePool, rng: random.Random, settings: BuildSettings) -> Draft:
    size, number = draw_sizes(rng, settings.gallery, 1)
    for _ in range(ATTEMPTS):
        dialogue = draw_dialogue(pool, rng, size, number)
        if dialogue is not None:
            further = TURN_TOKENS * (1 if dialogue.kept_by is None else 2)
            taken = further + sum(pool.caption_tokens[n] for n in dialogue.list_captions())
            taken += sum(pool.attribute_tokens[n] for n in dialogue.list_attributes())
            gallery, _ = _fit_gallery(pool, rng, settings, dialogue.images, 0, taken, least=2)
            return dialogue.place(gallery)
    raise _refuse_alike(pool)


def _build_comparison(pool: ImagePool, rng: random.Random, settings: BuildSettings) -> Draft:
    # Two of three pairs are different people, else there would be no differences to describe.
    image, others = _draw_with_others(pool, rng, 1, pool.attributed, pool.attributed)
    same = [i for i in pool.list_positives(image) if pool.list_attributes(i)]
    other = pick(rng, same) if same and rng.random() < 1 / 3 else others[0]
    attributes = _place_attributes(pool, image, 0) + _place_attributes(pool, other, 1)
    return Draft([image, other], 2, attributes=attributes)


def _build_prediction(pool: ImagePool, rng: random.Random, settings: BuildSettings) -> Draft:
    image = pick(rng, pool.attributed)
    return Draft([image], 1, attributes=_place_attributes(pool, image, 0))


BUILDERS: dict[str, Builder] = {
    "image_captioning": _build_captioning,
    "image_to_image_one_to_one": _build_image_pair,
    "image_to_image_many_to_many": partial(_build_gallery, smallest=2, change=None),
    "text_to_image_one_to_one": _build_text_pair,
    "text_to_image_many_to_one": _build_caption_choice,
    "text_to_image_one_to_many": _build_image_choice,
    "attribute_comparison": _build_comparison,
    "attribute_prediction": _build_prediction,
    "standard_reid": partial(_build_gallery, smallest=1, change="camera"),
    "cloth_changing_reid": partial(_build_gallery, smallest=1, change="clothes"),
    "visible_infrared_reid": partial(_build_gallery, smallest=1, change="modality"),
    "text_to_image_reid": _build_text_retrieval,
    "attribute_retrieval": _build_attribute_retrieval,
    "multimodal_retrieval": _build_multimodal,
    "dialogue_retrieval": _build_dialogue,
    "attribute_one_to_one": _build_attribute_pair,
    "multimodal_one_to_one": _build_multimodal_pair,
}

# Tasks of a setting: in what their matches differ from the query, whatever the source's shares are.
_TASK_CHANGES: dict[str, Change] = {
    "standard_reid": "camera",
    "cloth_changing_reid": "clothes",
    "visible_infrared_reid": "modality",
}


ALIKE = "no two people who are described differently"


def explain_missing(task: str, pool: ImagePool) -> str | None:
    """Return why this pool cannot give records of the task, or None if it can."""
    if task == "image_captioning":
        return None if pool.captioned else "no captions"
    if task == "attribute_prediction":
        return None if pool.attributed else "no attributes"
    if task.startswith(("text_to_image", "attribute")):
        described, missing = (
            (pool.attributed, "no attributes") if task.startswith("attribute") else (pool.captioned, "no captions")
        )
        if not described:
            return missing
        return None if pool.has_unlike(described) else ALIKE
    if task == "dialogue_retrieval":
        return _explain_missing_words(pool)
    if len(pool.people) < 2:
        return "only one identity"
    if task.startswith("multimodal"):
        described = pool.multimodal_queries.most
        return None if described else "no identity seen by two cameras and described in two ways"
    if task in _TASK_CHANGES:
        change = _TASK_CHANGES[task]
        return None if pool.queries[change].most else NO_MATCHES[change]
    return None if pool.list_changes() else " and ".join(NO_MATCHES[change] for change in pool.changes)


def _explain_missing_words(pool: ImagePool) -> str | None:
    """Return why this pool cannot give dialogues, which begin with captions or attributes and add to them."""
    if not (pool.captioned or pool.attributed):
        return "neither captions nor attributes"
    if not (pool.caption_openings.most or pool.attribute_openings):
        return "no identity with two images and more than one caption or attribute"
    begun = [pool.captioned] if pool.caption_openings.most else []
    begun += [pool.attributed] if pool.attribute_openings else []
    return None if any(pool.has_unlike(images) for images in begun) else ALIKE


def build_draft(task: str, pool: ImagePool, rng: random.Random, settings: BuildSettings, record_id: str) -> Draft:
    """Draw one record of a task from a pool.

    Raises:
        DataError: the record would be longer than ``cutoff_len``: cut off image tokens break training.
    """
    draft = BUILDERS[task](pool, rng, settings)
    visual = sum([pool.tokens[image] for image in draft.images]) + TOKENS_AROUND_IMAGE * len(draft.images)
    text = TEXT_TOKENS + sum([pool.caption_tokens[number] for number in draft.captions])
    text += sum([pool.attribute_tokens[number] for _, number in draft.attributes])
    text += 0 if draft.text is None else pool.caption_tokens[draft.text]
    for turn in draft.turns:
        text += TURN_TOKENS
        text += 0 if turn.caption is None else pool.caption_tokens[turn.caption]
        text += 0 if turn.attribute is None else pool.attribute_tokens[turn.attribute]
    if visual + text > settings.cutoff_len:
        raise DataError(
            f"Record {record_id}: {visual} tokens of {len(draft.images)} image(s) and about {text} of text do not fit "
            f"cutoff_len {settings.cutoff_len}. Raise it."
        )
    return draft
