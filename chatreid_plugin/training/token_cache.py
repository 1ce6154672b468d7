"""Token ids of texts that come again: the system prompt, a wording with its image marks, an answer.

Records of one wording and gallery size differ in their images alone, and images are single tokens while the text is
tokenized (``cutoff.py``).
"""

from functools import lru_cache
from typing import Any


# A few megabytes; the tasks, their wordings and 26 gallery sizes make some hundred texts without captions.
REMEMBERED_TEXTS = 2048


class RememberingTokenizer:
    """A tokenizer that remembers the ids of the texts it has met last; everything else is the tokenizer's own."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._encode = lru_cache(REMEMBERED_TEXTS)(self._encode_anew)

    def _encode_anew(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return a text's token ids, as the tokenizer's method does."""
        return list(self._encode(text, add_special_tokens))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __reduce__(self) -> tuple[type["RememberingTokenizer"], tuple[Any]]:
        # Without the memory: it is no part of the key of datasets' map cache, nor of what a worker is sent.
        return RememberingTokenizer, (self.tokenizer,)
