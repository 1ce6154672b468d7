"""Standard Re-ID: Market-1501, MSMT17, CUHK03 in both protocols, and a user's own folder."""

from dataclasses import replace

from ...eval_settings import EvalSettings
from ...records import ImageRecord
from ..queries import make_image_query
from .definition import RULES, Protocol, Rule, SkippedQuery
from .source import Source


def _make_protocol(source: Source, settings: EvalSettings, variant: str, rule: Rule = "same_camera") -> Protocol:
    queries = [make_image_query(record) for record in source.queries]
    return Protocol(settings.protocol, f"{variant}, {RULES[rule]}", queries, source.gallery, source.image_root, rule)


def _is_distractor(record: ImageRecord) -> bool:
    """Market-1501 publishes distractors as identity 0; they are nobody's match."""
    return record.person_id.rpartition(":")[2].strip("0") == ""


def load_market1501(source: Source, settings: EvalSettings) -> Protocol:
    """Single query; the gallery has the distractors (identity 0) and not the junk (-1), which the parser left out.

    Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015.
    """
    protocol = _make_protocol(source, settings, "single query")
    skipped = [
        SkippedQuery(record.image_id, f"identity {record.person_id} is absent from the gallery")
        for record in source.queries
        if _is_distractor(record)
    ]
    left_out = {item.query_id for item in skipped}
    queries = [query for query in protocol.queries if query.query_id not in left_out]
    return replace(protocol, queries=queries, skipped=tuple(skipped))


def load_msmt17(source: Source, settings: EvalSettings) -> Protocol:
    """Test lists as published; V1 or V2 is the manifest's variant (Wei et al., CVPR 2018)."""
    return _make_protocol(source, settings, f"{(source.variant or 'v1').upper()}, single query")


def load_cuhk03(source: Source, settings: EvalSettings) -> Protocol:
    """Return the new protocol, 767 / 700 identities; detected or labelled boxes are the manifest's variant.

    Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017.
    """
    return _make_protocol(source, settings, f"new protocol 767/700, {source.variant or 'detected'} boxes")


def load_cuhk03_classic(source: Source, settings: EvalSettings) -> Protocol:
    """Return one of the 20 classic splits: all test images are queries and gallery; exact single-gallery-shot CMC.

    Li et al., "DeepReID", CVPR 2014; torchreid draws ten random galleries instead of taking the expectation.

    Raises:
        DataError: the manifest is of the new protocol.
    """
    split = f"split {source.need('trial', 'Parse CUHK03 with variant: detected_classic or labeled_classic.')}"
    boxes = source.variant.removesuffix("_classic") or "unknown"
    variant = f"classic, {split}, {boxes} boxes, {RULES['same_camera']}"
    queries = [make_image_query(record) for record in source.gallery]
    root = source.image_root
    return Protocol(settings.protocol, variant, queries, source.gallery, root, cmc="single_gallery_shot", split=split)


def load_folder(source: Source, settings: EvalSettings) -> Protocol:
    """Any manifest with queries and a gallery; ``camera_rule: false`` ignores nothing."""
    return _make_protocol(source, settings, "single query", "same_camera" if settings.camera_rule else "nothing")
