"""Person re-identification for LLaMA-Factory: data formats, staged tuning and an evaluator, as a plugin.

Importing this package loads nothing heavy (no torch, no llamafactory).
"""

__version__ = "0.1.0"
