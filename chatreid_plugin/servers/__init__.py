"""Asking an OpenAI-compatible server, for captions (``engine/captions``) and for scores (``eval/backends``)."""
