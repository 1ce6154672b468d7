"""The types of the evaluator's arrays, by what they hold; the shapes are in the docstrings of what takes them."""

import numpy as np
import numpy.typing as npt


ScoreArray = npt.NDArray[np.float32]  # scores, similarities and features, as models give them
FloatArray = npt.NDArray[np.float64]  # metrics and what they are computed from
IntArray = npt.NDArray[np.int64]  # indices, ranks and labels
BoolArray = npt.NDArray[np.bool_]  # masks
