"""How large the published test sets are: a run on other counts must not stand unmarked beside published figures.

Counts are those of eval/README.md; queries are counted with those that match nothing and are skipped.
"""

from collections.abc import Mapping

from ...eval_settings import EvalSettings
from .definition import Protocol


# Protocol and form to queries and gallery of a trial; None where nobody says.
SIZES: Mapping[tuple[str, ...], tuple[int, int | None]] = {
    ("market1501",): (3368, 15913),
    ("msmt17",): (11659, 82161),
    ("cuhk03", "detected"): (1400, 5332),
    ("cuhk03", "labeled"): (1400, 5328),
    ("ltcc",): (493, 7050),
    ("prcc", "cross_clothes", "multi"): (3543, 3384),
    ("prcc", "cross_clothes", "single"): (3543, 71),
    ("prcc", "same_clothes", "multi"): (3873, 3384),
    ("prcc", "same_clothes", "single"): (3873, 71),
    ("sysumm01", "all", "single"): (3803, 301),
    ("sysumm01", "all", "multi"): (3803, 3010),
    ("sysumm01", "indoor", "single"): (3803, 112),
    ("sysumm01", "indoor", "multi"): (3803, 1120),
    ("regdb",): (2060, 2060),
    ("llcm", "infrared_to_visible"): (7166, None),
    ("llcm", "visible_to_infrared"): (8680, None),
    ("cuhkpedes", "text_to_image"): (6156, 3074),
    ("cuhkpedes", "image_to_text"): (3074, 6156),
    ("icfgpedes",): (19848, 19848),
    ("rstpreid", "text_to_image"): (2000, 1000),
    ("rstpreid", "image_to_text"): (1000, 2000),
}


def _find_size(settings: EvalSettings, variant: str) -> tuple[int, int | None]:
    """Return the published counts of what the settings evaluate; nothing where there are none."""
    if settings.restrict:
        return 0, None
    name, setting, shots = (settings.protocol, settings.choose("setting"), settings.choose("shots"))
    boxes = variant.partition("_")[0] or "detected"
    forms = ((name,), (name, boxes), (name, setting), (name, setting, shots))
    return next((SIZES[form] for form in forms if form in SIZES), (0, None))


def compare_size(protocol: Protocol, settings: EvalSettings, variant: str) -> str:
    """Say how the queries and the gallery differ in number from the published test set; nothing if they do not.

    Args:
        protocol: with all of its queries.
        settings: the evaluation.
        variant: the form of the data set that the manifest has, e.g. ``labeled``.
    """
    queries, gallery = _find_size(settings, variant)
    found = len(protocol.queries) + len(protocol.skipped), len(protocol.trial_galleries[0])
    if not queries or (found[0] == queries and gallery in (None, found[1])):
        return ""
    wanted = f"{queries:,}" if gallery is None else f"{queries:,} x {gallery:,}"
    return (f"{found[0]:,}" if gallery is None else f"{found[0]:,} x {found[1]:,}") + f" instead of {wanted}"
