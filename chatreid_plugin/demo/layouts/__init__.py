"""The synthetic world in the published layouts: one function per data set, a small copy of its folders and files."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from .attribute_sets import write_pa100k, write_peta, write_rapv1, write_rapv2
from .captioned import write_lupersonmllm, write_mals, write_synthpedes
from .clothes import write_ltcc, write_prcc
from .cuhk03 import write_cuhk03_classic, write_cuhk03_new, write_cuhk03_np
from .infrared import write_llcm, write_regdb, write_sysumm01
from .long_term import write_celebreid, write_celebreid_light, write_deepchange, write_last, write_vcclothes
from .market import write_market1501
from .msmt17 import write_msmt17_market, write_msmt17_v1, write_msmt17_v2
from .rendered_sets import write_personx, write_randperson_full, write_randperson_subset
from .small_sets import write_cuhk01, write_cuhk02, write_occludedreid, write_viper
from .studio import Layout
from .text import write_cuhkpedes, write_icfgpedes, write_rstpreid, write_ufine6926


LayoutWriter = Callable[[Path, int], Layout]

# Parser name -> function(root, seed): writes below root, small, and returns what a parser has to find.
LAYOUTS: dict[str, LayoutWriter] = {
    "market1501": write_market1501,
    "msmt17:v1": write_msmt17_v1,
    "msmt17:v2": write_msmt17_v2,
    "msmt17:market": write_msmt17_market,
    "cuhk03:detected": partial(write_cuhk03_new, boxes="detected"),
    "cuhk03:labeled": partial(write_cuhk03_new, boxes="labeled"),
    "cuhk03:detected_np": partial(write_cuhk03_np, boxes="detected"),
    "cuhk03:labeled_np": partial(write_cuhk03_np, boxes="labeled"),
    "cuhk03:detected_classic": partial(write_cuhk03_classic, boxes="detected"),
    "cuhk03:labeled_classic": partial(write_cuhk03_classic, boxes="labeled"),
    "ltcc": write_ltcc,
    "prcc": write_prcc,
    "sysumm01": write_sysumm01,
    "regdb": write_regdb,
    "llcm": write_llcm,
    "cuhkpedes": write_cuhkpedes,
    "icfgpedes": write_icfgpedes,
    "rstpreid": write_rstpreid,
    "ufine6926": write_ufine6926,
    "synthpedes": write_synthpedes,
    "lupersonmllm": write_lupersonmllm,
    "mals": write_mals,
    "pa100k": write_pa100k,
    "peta": write_peta,
    "rapv1": write_rapv1,
    "rapv2": write_rapv2,
    "celebreid:full": write_celebreid,
    "celebreid:light": write_celebreid_light,
    "deepchange": write_deepchange,
    "last": write_last,
    "vcclothes": write_vcclothes,
    "personx": write_personx,
    "randperson:subset": write_randperson_subset,
    "randperson:full": write_randperson_full,
    "cuhk01": write_cuhk01,
    "cuhk02": write_cuhk02,
    "viper": write_viper,
    "occludedreid": write_occludedreid,
}
