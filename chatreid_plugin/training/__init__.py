"""TRAIN: everything that touches LLaMA-Factory; loaded by ``_autoload`` as LLaMA-Factory's own modules load."""
