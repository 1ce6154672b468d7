"""Names of other packages that they do not promise: found, or one clear error with the versions that were tested."""

from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

from .errors import UpstreamError


TESTED_VERSIONS = {"llamafactory": "0.9.5", "transformers": "5.5.4", "peft": "0.18.1"}


def find_version(package: str) -> str:
    """Return a package's installed version, or ``unknown``."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def get_upstream(module: ModuleType, name: str) -> Any:
    """Return ``module.name`` (dots allowed).

    Raises:
        UpstreamError: the name is gone.
    """
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            package = module.__name__.partition(".")[0]
            tested = TESTED_VERSIONS[package]
            raise UpstreamError(
                f"{package} {find_version(package)} has no {module.__name__}.{name}; this plugin was tested with "
                f"{tested}. Install {package}=={tested} or a newer chatreid-plugin."
            )
        value = getattr(value, part)
    return value
