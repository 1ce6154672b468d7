"""Which module knows a data set, and which a benchmark: every module of this folder is asked for its tables.

``DATASETS`` has parser's name -> ``DataSet``, ``BENCHMARKS`` name in the YAML -> ``BenchmarkRules``; a module that has
neither is none of a data set. So a new file is known without being entered anywhere.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

from .. import datasets
from ..config import SourceSettings
from ..errors import ConfigError
from .benchmark import BenchmarkRules
from .catalog import check_counts, refuse_withdrawn
from .listing import DataSet, Listing, check_places


@cache
def load_modules() -> tuple[ModuleType, ...]:
    """Return every module of this folder, by name."""
    names = sorted(module.name for module in iter_modules(datasets.__path__))
    return tuple(import_module(f"{datasets.__name__}.{name}") for name in names)


def list_datasets() -> Mapping[str, DataSet]:
    """Return parser's name -> how the data set lies on disk."""
    tables: Iterator[Mapping[str, DataSet]] = (getattr(module, "DATASETS", {}) for module in load_modules())
    return {name: dataset for table in tables for name, dataset in table.items()}


def list_benchmarks() -> Mapping[str, BenchmarkRules]:
    """Return name in the YAML -> how the benchmark is measured."""
    tables: Iterator[Mapping[str, BenchmarkRules]] = (getattr(module, "BENCHMARKS", {}) for module in load_modules())
    return {name: rules for table in tables for name, rules in table.items()}


def list_source(source: SourceSettings) -> Listing:
    """Return the crops of a source without opening any image; published counts are checked.

    Raises:
        ConfigError: an unknown parser or variant, a key of another parser, or a data set that was withdrawn.
        DataError: see the parsers and ``check_places``; or counts differ from the published ones and
            ``allow_count_mismatch`` is off.
    """
    refuse_withdrawn(source)
    known = list_datasets()
    if source.parser_name not in known:
        raise ConfigError(
            f"Source {source.name}: unknown parser {source.parser_name!r}. Known: {', '.join(sorted(known))}."
        )
    _refuse_keys_of_others(source)
    listing = known[source.parser_name].list_images(source)
    check_places(listing)
    listing.warnings += check_counts(source, listing.crops)
    return listing


def _refuse_keys_of_others(source: SourceSettings) -> None:
    """Refuse settings that only other parsers read: they would be passed over in silence."""
    known = list_datasets()
    for key in {key: None for dataset in known.values() for key in dataset.keys}:
        readers = [name for name, dataset in known.items() if key in dataset.keys]
        if getattr(source, key) and source.parser_name not in readers:
            raise ConfigError(
                f"Source {source.name}: `{key}` belongs to the parsers {', '.join(readers)}; this source's parser is "
                f"{source.parser_name}. Remove the key, or set `parser`."
            )
