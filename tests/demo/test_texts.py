"""The warm-up's texts: every attribute has a cell, every task of the phases makes a record that renders."""

import numpy as np
import pytest

from chatreid_plugin.demo.people import VOCABULARY, sample_people
from chatreid_plugin.demo.texts import CELLS, PHASES, draw_task, draw_text, list_vocabulary_texts, write_cells
from chatreid_plugin.tasks import IMAGE_MARK


PEOPLE = sample_people(12, 0)


def test_every_attribute_has_a_cell() -> None:
    assert {name for cell in CELLS for name in cell} == set(VOCABULARY)


def test_cells_name_what_the_person_wears() -> None:
    words = " ".join(write_cells(PEOPLE[0]))
    assert all(value in words for value in PEOPLE[0].attributes.values())


@pytest.mark.parametrize("phase", [0, 1])
def test_tasks_come_by_the_weights_of_their_phase(phase: int) -> None:
    rng = np.random.default_rng(0)
    progress = 0.0 if phase == 0 else 1.0
    drawn = [draw_task(rng, progress) for _ in range(2000)]
    weights = PHASES[phase][1]
    assert set(drawn) <= set(weights)
    for task, weight in weights.items():
        # Four standard deviations of a binomial share.
        assert abs(drawn.count(task) / 2000 - weight) < 4 * (weight * (1 - weight) / 2000) ** 0.5


@pytest.mark.parametrize("task", sorted({task for _, weights in PHASES for task in weights}))
def test_text_has_one_mark_for_each_person_shown(task: str) -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        prompt, answer, shown = draw_text(task, PEOPLE, rng)
        assert prompt.count(IMAGE_MARK) == len(shown)
        assert answer.endswith("<|im_end|>\n")


def test_matching_is_answered_by_who_is_shown() -> None:
    rng = np.random.default_rng(2)
    for _ in range(40):
        _, answer, (first, second) = draw_text("image_to_image_one_to_one", PEOPLE, rng)
        assert answer.startswith("Yes") == (first is second)


def test_vocabulary_texts_hold_every_attribute_value() -> None:
    text = " ".join(list_vocabulary_texts(sample_people(200, 0)))
    missing = [value for values in VOCABULARY.values() for value in values if value not in text]
    assert missing == []
