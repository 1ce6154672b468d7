"""The client of OpenAI-compatible servers, ours or others': for captions (``engine/captions``) and scores (``eval``).

Our own server is the package ``serve``.
"""
