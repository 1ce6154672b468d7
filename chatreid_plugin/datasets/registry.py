"""One function per data set layout: a raw folder in, a ``Listing`` of labelled crops out. ``PARSERS`` names them."""

from collections.abc import Callable

from ..config import SourceSettings
from ..errors import ConfigError
from .attribute_sets import list_pa100k, list_peta, list_rapv1, list_rapv2
from .captioned import list_lupersonmllm, list_mals, list_synthpedes
from .catalog import check_counts, refuse_withdrawn
from .clothes import list_ltcc, list_prcc
from .cuhk03 import list_cuhk03
from .infrared import list_llcm, list_regdb
from .labelled_list import list_labelled
from .listing import Listing
from .long_term import list_celebreid, list_deepchange, list_last, list_vcclothes
from .market import list_market1501
from .msmt17 import list_msmt17
from .pattern import list_pattern
from .places import check_places
from .rendered_sets import list_personx, list_randperson
from .small_sets import list_cuhk01, list_cuhk02, list_occludedreid, list_viper
from .sysu import list_sysumm01
from .text import list_cuhkpedes, list_icfgpedes, list_rstpreid, list_ufine6926


Parser = Callable[[SourceSettings], Listing]

PARSERS: dict[str, Parser] = {
    "market1501": list_market1501,
    "msmt17": list_msmt17,
    "cuhk03": list_cuhk03,
    "ltcc": list_ltcc,
    "prcc": list_prcc,
    "sysumm01": list_sysumm01,
    "regdb": list_regdb,
    "llcm": list_llcm,
    "cuhkpedes": list_cuhkpedes,
    "icfgpedes": list_icfgpedes,
    "rstpreid": list_rstpreid,
    "ufine6926": list_ufine6926,
    "synthpedes": list_synthpedes,
    "lupersonmllm": list_lupersonmllm,
    "mals": list_mals,
    "pa100k": list_pa100k,
    "peta": list_peta,
    "rapv1": list_rapv1,
    "rapv2": list_rapv2,
    "celebreid": list_celebreid,
    "deepchange": list_deepchange,
    "last": list_last,
    "vcclothes": list_vcclothes,
    "personx": list_personx,
    "randperson": list_randperson,
    "cuhk01": list_cuhk01,
    "cuhk02": list_cuhk02,
    "viper": list_viper,
    "occludedreid": list_occludedreid,
    "pattern": list_pattern,
    "list": list_labelled,
}

_OWN = ("pattern", "list")
# Settings that only some parsers read; elsewhere they would be passed over in silence.
_READERS = {
    "pattern": ("pattern",),
    "labels": ("list", "cuhkpedes", "icfgpedes", "rstpreid", "ufine6926"),
    "query_cameras": _OWN,
    "queries_per_person": _OWN,
}


def _refuse_keys_of_others(source: SourceSettings) -> None:
    for key, readers in _READERS.items():
        if getattr(source, key) and source.parser_name not in readers:
            raise ConfigError(
                f"Source {source.name}: `{key}` belongs to the parsers {', '.join(readers)}; this source's parser is "
                f"{source.parser_name}. Remove the key, or set `parser`."
            )


def list_source(source: SourceSettings) -> Listing:
    """Return the crops of a source without opening any image; published counts are checked.

    Raises:
        ConfigError: an unknown parser or variant, a key of another parser, or a data set that was withdrawn.
        DataError: see the parsers and ``check_places``; or counts differ from the published ones and
            ``allow_count_mismatch`` is off.
    """
    refuse_withdrawn(source)
    if source.parser_name not in PARSERS:
        raise ConfigError(
            f"Source {source.name}: unknown parser {source.parser_name!r}. Known: {', '.join(sorted(PARSERS))}."
        )
    _refuse_keys_of_others(source)
    listing = PARSERS[source.parser_name](source)
    check_places(listing)
    listing.warnings += check_counts(source, listing.crops)
    return listing
