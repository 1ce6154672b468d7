"""Evaluation: a checkpoint and a manifest in, metrics, rankings and a page to look at out."""
