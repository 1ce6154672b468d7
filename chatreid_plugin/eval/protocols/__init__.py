"""The benchmarks: a manifest and its rules become a ``Protocol``, checked up front; first step of an evaluation.

A query that can match nothing is found here, with the reason, before a model is loaded.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...errors import ConfigError, DataError
from ...eval_settings import EvalSettings
from ..queries import Query
from .cloth_changing import load_ltcc, load_prcc
from .cross_modality import load_llcm, load_regdb, load_sysumm01
from .definition import REASONS, Labels, Protocol, SkippedQuery, count_copied_queries, label_protocol
from .sizes import compare_size
from .source import EXAMPLES_SHOWN, Source, check_images, read_source, take_evenly
from .standard import load_cuhk03, load_cuhk03_classic, load_folder, load_market1501, load_msmt17
from .words import load_attributes, load_multimodal, load_text


__all__ = ["Labels", "Protocol", "SkippedQuery", "label_protocol", "load_protocol"]

logger = logging.getLogger(__name__)

PROTOCOLS: dict[str, Callable[[Source, EvalSettings], Protocol]] = {
    "market1501": load_market1501,
    "msmt17": load_msmt17,
    "cuhk03": load_cuhk03,
    "cuhk03_classic": load_cuhk03_classic,
    "ltcc": load_ltcc,
    "prcc": load_prcc,
    "sysumm01": load_sysumm01,
    "regdb": load_regdb,
    "llcm": load_llcm,
    "cuhkpedes": load_text,
    "icfgpedes": load_text,
    "rstpreid": load_text,
    "attributes": load_attributes,
    "multimodal": load_multimodal,
    "folder": load_folder,
}
COPIES_IGNORED = "the query's own file ignored"
# In these the queries are no split of their own.
WITHOUT_QUERIES = ("cuhk03_classic", "cuhkpedes", "icfgpedes", "rstpreid", "attributes", "multimodal")


def load_protocol(settings: EvalSettings) -> Protocol:
    """Read the manifest and return its protocol, with the queries that can match something.

    ``max_queries`` takes an evenly spaced subset; ``average_precision`` is as the settings say. Where
    no image is looked at, as scores or features come from a file, missing image files are a warning.

    Raises:
        ConfigError: ``camera_rule: false`` with a published protocol.
        DataError: no queries, no gallery, image files missing, or no query with a match.
    """
    if settings.protocol != "folder" and not settings.camera_rule:
        raise ConfigError(
            f"camera_rule: false is not the protocol of {settings.protocol}, and its numbers could not be compared "
            "with others. Use protocol: folder to evaluate without the camera rule."
        )
    source = read_source(settings, queries_needed=settings.protocol not in WITHOUT_QUERIES)
    protocol = PROTOCOLS[settings.protocol](source, settings)
    if settings.ignore_copies:
        protocol = replace(protocol, ignore_copies=True, variant=f"{protocol.variant}, {COPIES_IGNORED}")
    protocol = _leave_out_unranked(_skip_unmatched(protocol, settings))
    unlike = compare_size(protocol, settings, source.variant)
    queries = take_evenly(protocol.queries, settings.max_queries)
    pictures = [query.image for query in queries if query.image is not None]
    check_images([*pictures, *protocol.gallery], protocol.image_root, required=settings.opens_images)
    limits = f"Only {len(queries):,} of {len(protocol.queries):,} queries ask (max_queries)."
    cautions = [limits] if len(queries) < len(protocol.queries) else []
    if unlike:
        cautions.append(f"Not the published test set: queries x gallery images are {unlike}.")
    changes = {"queries": queries, "unlike_published": unlike, "average_precision": settings.average_precision}
    return _note_copies(replace(protocol, **changes, cautions=tuple(cautions)))


def _note_copies(protocol: Protocol) -> Protocol:
    """Count the queries whose own file no rule ignores, and warn where it is ranked."""
    copied = count_copied_queries(protocol)
    if not copied or protocol.ignore_copies:
        return replace(protocol, copied_queries=copied)
    caution = (
        f"{copied:,} of {len(protocol.queries):,} queries have their own file in the gallery, byte for byte, and no "
        "rule ignores it: any model finds it first. Set ignore_copies: true, or take such images out of the gallery."
    )
    logger.warning("%s", caution)
    return replace(protocol, copied_queries=copied, cautions=(*protocol.cautions, caution))


def _skip_unmatched(protocol: Protocol, settings: EvalSettings) -> Protocol:
    """Leave out, with a reason, the queries that match nothing in some trial."""
    if not protocol.queries:
        name = f"{protocol.name} ({protocol.variant})"
        raise DataError(f"{settings.manifest}: no query is left by protocol {name}. Check its labels.")
    labels = label_protocol(protocol)
    inside = np.zeros((len(protocol.trial_galleries), len(protocol.gallery)), dtype=np.bool_)
    for trial, places in enumerate(protocol.trial_galleries):
        inside[trial, places] = True
    kept: list[Query] = []
    skipped = list(protocol.skipped)
    for place, query in enumerate(protocol.queries):
        matched = inside[:, labels.list_positives(place)].any(axis=1)
        if matched.all():
            kept.append(query)
        else:
            skipped.append(SkippedQuery(query.query_id, _explain(protocol, labels, place, int((~matched).sum()))))
    _report_skipped(skipped, len(kept), protocol, settings.manifest)
    return replace(protocol, queries=kept, skipped=tuple(skipped))


def _leave_out_unranked(protocol: Protocol) -> Protocol:
    """Leave out of the gallery what is in no trial, so that nothing is encoded, asked for or counted in vain."""
    if not protocol.trials:
        return protocol
    ranked = np.unique(np.concatenate(protocol.trials))
    trials = tuple(np.searchsorted(ranked, places) for places in protocol.trials)
    return replace(protocol, gallery=[protocol.gallery[place] for place in ranked.tolist()], trials=trials)


def _explain(protocol: Protocol, labels: Labels, place: int, unmatched_trials: int) -> str:
    query = protocol.queries[place]
    if not (labels.gallery_person == labels.query_person[place]).any():
        return f"identity {query.person_id} is absent from the gallery"
    if len(labels.list_positives(place)):
        trials = len(protocol.trial_galleries)
        return f"identity {query.person_id} has no match in the gallery of {unmatched_trials} of {trials} trials"
    if place in labels.copies:
        return f"identity {query.person_id} has no other match than the query's own file"
    return f"identity {query.person_id} {REASONS[protocol.rule].format(camera=query.camera_id)}"


def _report_skipped(skipped: list[SkippedQuery], kept: int, protocol: Protocol, manifest: Path) -> None:
    """Warn of queries without a match; refuse if none is left."""
    if not skipped:
        return
    lines = [f"  {item.query_id}: {item.reason}" for item in skipped[:EXAMPLES_SHOWN]]
    if len(skipped) > EXAMPLES_SHOWN:
        lines.append(f"  ... and {len(skipped) - EXAMPLES_SHOWN} more")
    total = len(skipped) + kept
    text = f"{len(skipped)} of {total} queries in {manifest} have no match in the gallery:\n" + "\n".join(lines)
    if kept:
        logger.warning("%s\nThey are skipped and are in no average.", text)
        return
    advice = "Check that query and gallery share identities"
    if protocol.rule == "same_camera":
        advice += "; if the cameras are unknown or all the same, set protocol=folder camera_rule=false"
    raise DataError(f"{text}\nNo query is left to evaluate. {advice}.")
