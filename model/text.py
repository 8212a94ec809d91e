"""How prompts and answers become token ids, alike in training and generation."""

from collections.abc import Hashable, Iterable, Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from epalm.config import TextConfig
from epalm.device import send
from epalm.errors import EpalmError


class Equal(NamedTuple):
    """Which of B texts are equal: U of them differ, and text b is text `first[row[b]]`.

    Attributes:
        first: (U,) index of the first of each.
        row: (B,) which of the U each text is.
    """

    first: torch.Tensor
    row: torch.Tensor

    @classmethod
    def among(cls, texts: Iterable[Hashable], device: torch.device | str = "cpu") -> "Equal":
        """Found on the CPU, where the texts come from; a GPU would have to be waited for."""
        number: dict[Hashable, int] = {}
        first: list[int] = []
        rows: list[int] = []
        for place, text in enumerate(texts):
            if text not in number:
                number[text] = len(first)
                first.append(place)
            rows.append(number[text])
        return cls(send(torch.tensor(first), device), send(torch.tensor(rows), device))

    def repeat(self, times: int) -> "Equal":
        """Of texts that stand `times` times in a row each (beams)."""
        return Equal(self.first * times, self.row.repeat_interleave(times))


class TextCodec:
    """The recipe's template around an LM's tokenizer.

    Prompt and answer are tokenised apart, so that the prompt's ids are the same with and without
    an answer behind them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: TextConfig):
        self.tokenizer, self.config = tokenizer, config
        self.eos: int = tokenizer.eos_token_id
        self.pad: int = tokenizer.pad_token_id
        self.separators = frozenset(map(tokenizer.convert_tokens_to_ids, config.special_tokens))

    def prompt(self, text: str) -> list[int]:
        """Ids of the filled template, with whatever the tokenizer puts first (OPT: BOS).

        Raises:
            EpalmError: longer than the recipe allows, or nothing at all.
        """
        ids: list[int] = self.tokenizer(self.config.template.format(prompt=text)).input_ids
        if len(ids) > self.config.max_prompt_tokens:
            raise EpalmError(
                f"prompt {text[:60]!r} has {len(ids)} tokens; shorten it or raise "
                f"text.max_prompt_tokens ({self.config.max_prompt_tokens})"
            )
        if not ids:
            raise EpalmError("text.template: gives no token for an empty prompt; add a word to it")
        return ids

    def answer(self, text: str) -> list[int]:
        """Ids of an answer and the end token (EOS)."""
        full = self.config.answer_prefix + text
        ids: list[int] = self.tokenizer(full, add_special_tokens=False).input_ids
        return [*ids, self.eos]

    def decode(self, ids: list[int]) -> str:
        """The text of generated ids up to the end token, without surrounding white space.

        An answer ends before another of `text.special_tokens` too, as in the official code
        (convention 28, its bug 15).
        """
        answer = list(takewhile(lambda token: token not in self.separators, ids))
        return self.tokenizer.decode(answer, skip_special_tokens=True).strip()


def pad_left(sequences: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, T) and attention mask (B, T) of sequences padded on the left."""
    length = max(len(s) for s in sequences)
    ids = torch.tensor([[pad] * (length - len(s)) + list(s) for s in sequences])
    mask = torch.tensor([[0] * (length - len(s)) + [1] * len(s) for s in sequences])
    return ids, mask
