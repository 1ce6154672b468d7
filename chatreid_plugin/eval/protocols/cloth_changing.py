"""Cloth-changing Re-ID: LTCC in three settings and PRCC in two, each by its usual reading."""

from dataclasses import replace
from random import Random

import numpy as np

from ...eval_settings import EvalSettings
from ..arrays import IntArray
from ..queries import make_image_query
from .definition import RULES, Protocol, Rule
from .source import Source


LTCC_RULES: dict[str, Rule] = {"cc": "cloth_changing", "standard": "same_camera", "sc": "same_clothes"}
# PRCC: people wear the same before cameras A and B; the gallery is A.
PRCC_QUERY_CAMERAS = {"same_clothes": "B", "cross_clothes": "C"}


def load_ltcc(source: Source, settings: EvalSettings) -> Protocol:
    """Standard, cloth-changing (``cc``) or same-clothes (``sc``) setting (Qian et al., ACCV 2020; Simple-CCReID).

    ``restrict: true`` keeps only the people that change clothes, in queries and gallery, as one family of papers
    does; their numbers are higher.

    Raises:
        DataError: ``restrict`` and the manifest does not name those people.
    """
    rule = LTCC_RULES[settings.setting or "cc"]
    queries, gallery, names = source.queries, source.gallery, settings.setting or "cc"
    if settings.restrict:
        advice = "Parse LTCC with its info folder, or set restrict: false."
        changing = set(source.need("cloth_change_test_people", advice))
        queries = [record for record in queries if record.person_id.rpartition(":")[2] in changing]
        gallery = [record for record in gallery if record.person_id.rpartition(":")[2] in changing]
        names += ", clothes-changing people only"
    asked = [make_image_query(record) for record in queries]
    return Protocol(settings.protocol, f"{names}, {RULES[rule]}", asked, gallery, source.image_root, rule)


def draw_single_shot(people: list[str], seed: int) -> IntArray:
    """Return one gallery index for each identity, drawn at random: ascending."""
    places: dict[str, list[int]] = {}
    for place, person in enumerate(people):
        places.setdefault(person, []).append(place)
    random = Random(seed)
    return np.array(sorted(random.choice(places[person]) for person in sorted(places)), dtype=np.int64)


def load_prcc(source: Source, settings: EvalSettings) -> Protocol:
    """Gallery: camera A; queries: B (same clothes) or C (cross-clothes); nothing is ignored (Yang et al., TPAMI 2021).

    ``shots: multi`` ranks all of A (CAL, Simple-CCReID), ``single`` one image of each person in ten seeded trials: the
    original ones were not published. Their mAP differ by tens of points and must not be mixed.
    """
    setting, shots = settings.setting or "cross_clothes", settings.shots or "multi"
    camera = PRCC_QUERY_CAMERAS[setting]
    asked = [make_image_query(record) for record in source.queries if record.camera_id == camera]
    variant = f"{setting.replace('_', '-')} (camera {camera} in A), {shots}-shot, {RULES['nothing']}"
    protocol = Protocol(settings.protocol, variant, asked, source.gallery, source.image_root, "nothing")
    if shots == "multi":
        return protocol
    people = [record.person_id for record in source.gallery]
    trials = tuple(draw_single_shot(people, settings.seed + trial) for trial in range(settings.trials))
    return replace(protocol, trials=trials)
