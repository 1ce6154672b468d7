"""Visible-infrared Re-ID: SYSU-MM01 with its trials, RegDB in both directions, LLCM."""

import logging
from collections.abc import Sequence
from random import Random

import numpy as np

from ...errors import ConfigError, DataError
from ...eval_settings import EvalSettings
from ...records import ImageRecord, Modality
from ..arrays import IntArray
from ..queries import make_image_query
from .definition import RULES, Protocol
from .source import Source


logger = logging.getLogger(__name__)

SYSU_CAMERAS = {"all": ("1", "2", "4", "5"), "indoor": ("1", "2")}
PARSE_SYSU = (
    "Put rand_perm_cam.mat into SYSU-MM01 and parse it again, or set shots: single and trials_from: agw_seed, "
    "which needs no such file."
)


def draw_by_camera(gallery: Sequence[ImageRecord], cameras: Sequence[str], trial: int) -> IntArray:
    """Return one gallery index for each identity and camera, drawn as AGW does.

    ``random.seed(trial)``, then identities and cameras in order and ``random.choice`` of the sorted files
    (Cross-Modal-Re-ID-baseline, data_manager.py, process_gallery_sysu; DEEN for LLCM).
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for place, record in enumerate(gallery):
        groups.setdefault((record.person_id, record.camera_id), []).append(place)
    random, drawn = Random(trial), list[int]()
    for person in sorted({person for person, _ in groups}):
        for camera in cameras:
            places = groups.get((person, camera))
            if places:
                drawn.append(random.choice(sorted(places, key=lambda place: gallery[place].path)))
    return np.array(sorted(drawn), dtype=np.int64)


def _read_published_trials(source: Source, cameras: Sequence[str], shots: int) -> list[IntArray]:
    places = {record.path: place for place, record in enumerate(source.gallery)}
    trials: list[IntArray] = []
    for trial in source.need("trials", PARSE_SYSU):
        groups = [group[:shots] for group in trial["paths"]]
        unknown = [path for group in groups for path in group if path not in places]
        if unknown:
            raise DataError(f"{source.path}: the published trials name {unknown[0]}, no gallery image. {PARSE_SYSU}")
        chosen = [places[path] for group in groups for path in group]
        trials.append(np.array(sorted(p for p in chosen if source.gallery[p].camera_id in cameras), dtype=np.int64))
    return trials


def _choose_trials_from(source: Source, settings: EvalSettings, shots: str) -> str:
    """Return where the galleries come from: as set, or the published trials, or without them AGW's seeding."""
    if settings.trials_from is not None or "trials" in source.notes or shots == "multi":
        return settings.trials_from or "published"
    logger.warning(
        "%s has no published trials of SYSU-MM01 (rand_perm_cam.mat), so its galleries are drawn by AGW's seeding: "
        'the results are of the variant "%d trials (agw_seed)". For the published ones put rand_perm_cam.mat into '
        "SYSU-MM01 and parse it again.",
        source.path,
        settings.trials,
    )
    return "agw_seed"


def load_sysumm01(source: Source, settings: EvalSettings) -> Protocol:
    """Infrared queries (cameras 3, 6) in visible galleries; mean of ten trials (Wu et al., ICCV 2017).

    ``setting`` all or indoor; ``shots`` single or multi (ten images of each identity and camera). ``trials_from``
    published permutation, or AGW's seeding, which draws single-shot galleries only; if it is not set, what the
    manifest allows. CMC counts identities.

    Raises:
        ConfigError: AGW's seeding with multi-shot.
        DataError: the manifest lacks the published trials, and they are asked for or needed.
    """
    setting, shots = settings.setting or "all", settings.shots or "single"
    cameras, trials_from = SYSU_CAMERAS[setting], _choose_trials_from(source, settings, shots)
    if trials_from == "published":
        trials = _read_published_trials(source, cameras, 1 if shots == "single" else 10)[: settings.trials]
    elif shots == "multi":
        raise ConfigError("trials_from: agw_seed draws single-shot galleries; set shots: single or trials_from.")
    else:
        trials = [draw_by_camera(source.gallery, cameras, trial) for trial in range(settings.trials)]
    words = f"{setting}-search, {shots}-shot, {len(trials)} trials ({trials_from}), {RULES['same_room']}"
    queries = [make_image_query(record) for record in source.queries]
    root = source.image_root
    return Protocol(
        settings.protocol,
        words,
        queries,
        source.gallery,
        root,
        "same_room",
        tuple(trials),
        cmc="unique_identity",
    )


def _turn(source: Source, asked: Modality) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """Return queries and gallery so that images of this modality ask."""
    sides = source.queries, source.gallery
    return sides if sides[0][0].modality == asked else (sides[1], sides[0])


def load_regdb(source: Source, settings: EvalSettings) -> Protocol:
    """One of ten splits, in the direction of ``setting``; nothing is ignored (Nguyen et al., Sensors 2017).

    Papers quote the mean over ten splits, each with a model of its own: ``{trial}`` in the manifest and the model.
    """
    setting = settings.setting or "visible_to_infrared"
    queries, gallery = _turn(source, "visible" if setting.startswith("visible") else "infrared")
    split = f"split {source.notes.get('trial', '?')}"
    variant = f"{setting.replace('_', ' ')}, {split}, {RULES['nothing']}"
    asked = [make_image_query(record) for record in queries]
    return Protocol(settings.protocol, variant, asked, gallery, source.image_root, "nothing", split=split)


def load_llcm(source: Source, settings: EvalSettings) -> Protocol:
    """One gallery image of each identity and camera, ten seeded trials, CMC over identities (Zhang & Wang, CVPR 2023).

    ``setting`` names the direction; same identity and same camera are ignored (their DEEN code, eval_llcm).
    """
    setting = settings.setting or "infrared_to_visible"
    queries, gallery = _turn(source, "visible" if setting.startswith("visible") else "infrared")
    cameras = sorted({record.camera_id for record in gallery})
    trials = tuple(draw_by_camera(gallery, cameras, trial) for trial in range(settings.trials))
    variant = f"{setting.replace('_', ' ')}, {len(trials)} trials, {RULES['same_camera']}"
    asked = [make_image_query(record) for record in queries]
    root = source.image_root
    return Protocol(settings.protocol, variant, asked, gallery, root, trials=trials, cmc="unique_identity")
