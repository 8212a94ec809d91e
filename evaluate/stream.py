"""An answer shown while it is generated."""

from collections.abc import Callable

import torch
from transformers import TextStreamer

from epalm.model.text import TextCodec


class AnswerStreamer(TextStreamer):
    """Hands on the words of one answer as they are finished; joined, they are the answer."""

    def __init__(self, codec: TextCodec, write: Callable[[str], object]):
        super().__init__(codec.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write, self._space, self._begun = write, "", False
        self._separators, self._over = codec.separators, False

    def put(self, value: torch.Tensor) -> None:
        """Tokens as they come, of which the first are the prompt; see `TextCodec.decode`."""
        if not self.next_tokens_are_prompt:
            self._over |= not self._separators.isdisjoint(value.flatten().tolist())
        if not self._over:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """White space is held back until a word follows: an answer neither begins nor ends so."""
        self._space += text[: len(text) - len(text.lstrip())]
        words = text.strip()
        if not words:
            return
        self._write((self._space if self._begun else "") + words)
        self._begun = True
        self._space = text[len(text.rstrip()) :]
