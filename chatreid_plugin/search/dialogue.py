"""What the dialogue asks back, and what the model says in words: the next question, why a hit, anything else.

The next question is about the attribute whose answer tells most about which of the first hits is meant: its expected
information gain, the mutual information of hit and answer, in bits. How likely a hit gives each answer is read by the
model (``attribute_one_to_one``), never taken from a gallery's labels; these only say which attributes there are.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit, softmax

from ..archives import FloatArray
from ..datasets.attribute_names import COLOURS
from ..datasets.benchmark import Query
from ..errors import ConfigError
from ..eval.questions import ATTRIBUTE_PAIR, Prompt, standardise
from ..pixels import open_crop, prepare_crop
from ..records import ImageRecord
from ..tasks import TASKS, clean_text, format_chat_prompt
from .ranking import KnownPairs, Ranked, Searcher
from .session import Session
from .turns import Turn


CONSIDERED = 10
MOST_VALUES = 12
ANSWER_TOKENS = 256
# Of galleries without labels; values that the annotations of PA-100K, PETA and RAP know.
USUAL: Mapping[str, tuple[str, ...]] = {
    "gender": ("male", "female"),
    "upper_colour": tuple(dict.fromkeys(COLOURS.values())),
    "lower_colour": tuple(dict.fromkeys(COLOURS.values())),
    "bag": ("backpack", "hand bag", "shoulder bag", "none"),
    "accessory": ("hat", "glasses", "none"),
    "lower": ("trousers", "shorts", "skirt or dress"),
    "sleeves": ("short", "long"),
}


@dataclass(frozen=True, slots=True)
class Question:
    """A question to whoever knows the person.

    Attributes:
        name: of the attribute.
        values: possible answers, the likeliest first.
        shares: how likely each is, by what the model reads on the first hits.
        gain: expected information about which hit is meant, in bits.
    """

    name: str
    values: tuple[str, ...]
    shares: tuple[float, ...]
    gain: float

    def render(self) -> str:
        """Return it as a sentence."""
        answers = ", ".join(f"{value} ({share:.0%})" for value, share in zip(self.values, self.shares, strict=True))
        return f"{self.name.replace('_', ' ')}? {answers} (expected information {self.gain:.2f} bits)"


def list_attributes(searcher: Searcher) -> dict[str, tuple[str, ...]]:
    """Return the attributes that can be asked for, with their most frequent values; a usual list without labels."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for image in searcher.gallery.images:
        for name, value in image.record.attributes.items():
            counts[name][value] += 1
    found = {name: tuple(sorted(dict(values.most_common(MOST_VALUES)))) for name, values in sorted(counts.items())}
    return {name: values for name, values in found.items() if len(values) > 1} or dict(USUAL)


def list_questions(searcher: Searcher, wanted: Turn, ranked: Ranked) -> list[Question]:
    """Return the questions that are open about the first hits, the one with the largest gain first.

    Raises:
        ConfigError: no model reads attributes.
    """
    _need_model(searcher)
    scored = [place for place in ranked.order.tolist() if place in ranked.scores][:CONSIDERED]
    records = [searcher.gallery.images[place].record for place in scored]
    if len(records) < 2:
        return []
    prior = softmax(standardise(np.array([ranked.scores[place] for place in scored])))
    settled = {*wanted.attributes, *wanted.unknown}
    attributes = {name: values for name, values in list_attributes(searcher).items() if name not in settled}
    questions = [_weigh(searcher, prior, records, *item) for item in attributes.items()]
    return sorted(questions, key=lambda question: (-question.gain, question.name))


def _weigh(
    searcher: Searcher, prior: FloatArray, records: Sequence[ImageRecord], name: str, values: tuple[str, ...]
) -> Question:
    """Return the question about an attribute, as the model reads it on the hits."""
    likelihood = read_attribute(searcher, records, name, values)
    shares = prior @ likelihood
    order = np.argsort(-shares, kind="stable").tolist()
    gain = expect_gain(prior, likelihood)
    return Question(name, tuple(values[at] for at in order), tuple(float(shares[at]) for at in order), gain)


def read_attribute(searcher: Searcher, records: Sequence[ImageRecord], name: str, values: Sequence[str]) -> FloatArray:
    """Return how likely each image (N) has each value (V), by the model's answers; rows sum to 1."""
    pairs = _need_model(searcher)
    searcher.restore(records)
    columns: list[FloatArray] = []
    for value in values:
        query = Query("attributes", "", attributes={name: value})
        scores = pairs.score_pairs(query, records, ATTRIBUTE_PAIR).astype(np.float64)
        # Hard answers are shares of votes already.
        columns.append(scores if pairs.confidence == "answers" else expit(scores))
    found = np.stack(columns, axis=1) + np.finfo(np.float64).tiny
    return found / found.sum(axis=1, keepdims=True)


def _need_model(searcher: Searcher) -> KnownPairs:
    if searcher.pairs is None:
        raise ConfigError("Questions need a model that looks at the pictures: give --model, or a server.")
    return searcher.pairs


def expect_gain(prior: FloatArray, likelihood: FloatArray) -> float:
    """Return the mutual information, in bits, of which hit is meant (N,) and what the answer will be (N, V).

    Example:
        >>> expect_gain(np.array([0.5, 0.5]), np.array([[1.0, 0.0], [0.0, 1.0]]))
        1.0
    """
    answers = prior @ likelihood
    return max(0.0, _entropy(answers) - float(prior @ np.array([_entropy(row) for row in likelihood])))


def _entropy(shares: FloatArray) -> float:
    known = shares[shares > 0]
    return float(-(known * np.log2(known)).sum())


def explain(session: Session, hit: str | int) -> str:
    """Return what the query picture and a hit have in common and how they differ, in the model's words.

    Raises:
        ConfigError: there is no query picture, or no model.
        DataError: there is no such hit.
    """
    words = TASKS["attribute_comparison"].prompts[0]
    return _compare(session, hit, words.split("{image}"))


def ask_freely(session: Session, hit: str | int, words: str) -> str:
    """Return the model's answer to a question about the query picture and a hit, shown in this order.

    Raises:
        ConfigError: the question is empty, there is no query picture, or no model.
        DataError: there is no such hit.
    """
    if not clean_text(words):
        raise ConfigError("The question is empty: say what the model shall be asked about the two pictures.")
    return _compare(session, hit, ["", "", clean_text(words)])


def _compare(session: Session, hit: str | int, segments: Sequence[str]) -> str:
    """Ask about the current picture, or else the last one that was confirmed, and a hit."""
    searcher, wanted = session.searcher, session.wanted
    asked = wanted.image or (wanted.same[-1] if wanted.same else "")
    if not asked:
        raise ConfigError("There is no picture to compare a hit with: --use a hit, or ask with --image.")
    return _answer(
        searcher, Prompt(tuple(segments)), [searcher.find_record(asked), searcher.find_record(session.find(hit))]
    )


def _answer(searcher: Searcher, prompt: Prompt, images: Sequence[ImageRecord]) -> str:
    scorer: Any = _need_model(searcher).scorer
    if searcher.settings.scoring.backend == "http":
        return scorer.answer(prompt, images, ANSWER_TOKENS)
    # Imported here: torch and transformers take seconds to load.
    from ..serve.completions import IMAGE_TOKENS, complete

    content = IMAGE_TOKENS.join(prompt.segments)
    text = format_chat_prompt(content, scorer.model.config.model_type, scorer.system_prompt)
    root, policy = searcher.gallery.root, searcher.settings.model.policy
    pictures = [prepare_crop(open_crop(root / Path(record.path)), policy) for record in images]
    return complete(scorer.model, scorer.processor, text, pictures, ANSWER_TOKENS, None).text.strip()
