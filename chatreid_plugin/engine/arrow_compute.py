"""pyarrow's compute functions, for modules that are type-checked."""

from typing import Any

import pyarrow.compute


# They are made when pyarrow.compute is imported, so no type checker knows them.
pc: Any = pyarrow.compute
