"""Data sets: how each lies on disk and how it is measured, one file for a set or a family of sets."""
