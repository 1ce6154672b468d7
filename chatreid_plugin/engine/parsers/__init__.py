"""One function per data set layout: a raw folder in, a ``Listing`` of labelled crops out. ``PARSERS`` names them."""

from collections.abc import Callable

from ...config import SourceSettings
from ..listing import Listing
from .attribute_sets import list_pa100k, list_peta, list_rapv1, list_rapv2
from .captioned import list_lupersonmllm, list_mals, list_synthpedes
from .clothes import list_ltcc, list_prcc
from .cuhk03 import list_cuhk03
from .infrared import list_llcm, list_regdb
from .labelled_list import list_labelled
from .long_term import list_celebreid, list_deepchange, list_last, list_vcclothes
from .market import list_market1501
from .msmt17 import list_msmt17
from .pattern import list_pattern
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
