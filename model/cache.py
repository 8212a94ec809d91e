"""Keys and values of the prefix and the text after it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from epalm.model.text import Equal

CACHE = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"
"""Of the argument of a layer, and of a model's output; the second until transformers 5.23."""


class _KeysKept(Exception):
    """A layer has come as far as it is wanted."""


class PrefixCache(DynamicCache):
    """Keys and values of the prefix, then of the text; its length counts the text alone.

    Args:
        perceptual: t, the number of perceptual tokens.
        prompt: P, that of prompt tokens.

    Attributes:
        prefix_in_first_layer: how many states the prefix has in layer 0.
        equal: which of the texts are, until the first of them is run; None: all differ.
    """

    prefix_in_first_layer = 0
    equal: Equal | None = None
    _keys_only = False

    def __init__(self, perceptual: int, prompt: int) -> None:
        super().__init__()
        self._perceptual, self._prompt = perceptual, prompt
        self._rows_to_come: dict[int, torch.Tensor] = {}

    def length(self, lower: bool) -> int:
        """Of the prefix: P in a layer below the first injection layer, t + P in the others."""
        return self._prompt + (0 if lower else self._perceptual)

    @contextmanager
    def keys_only(self) -> Iterator[None]:
        """Within it, a layer that is called ends once its keys and values are kept.

        In the last layer nothing else is wanted of a state that no token is predicted from. Its
        attention and feed-forward part are not run.
        """
        self._keys_only = True
        try:
            yield
        except _KeysKept:
            pass
        finally:
            self._keys_only = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *others: Any,
        **named: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        if layer_idx in self._rows_to_come:
            self.take(range(layer_idx, layer_idx + 1), self._rows_to_come.pop(layer_idx))
        found: tuple[torch.Tensor, torch.Tensor] = super().update(
            key_states, value_states, layer_idx, *others, **named
        )
        if self._keys_only:
            raise _KeysKept
        return found

    def get_seq_length(self, layer_idx: int = 0) -> int:
        if layer_idx != 0:
            raise ValueError("only the first layer's text length is defined")
        return super().get_seq_length(0) - self.prefix_in_first_layer

    def take(self, layers: range, rows: torch.Tensor) -> None:
        """In these layers, let row b become what row `rows[b]` was."""
        for layer in self.layers[layers.start : layers.stop]:
            if layer.is_initialized:
                own = rows.to(layer.keys.device)  # another one where the LM is spread over several
                layer.keys = layer.keys.index_select(0, own)
                layer.values = layer.values.index_select(0, own)

    def take_later(self, layers: range, rows: torch.Tensor) -> None:
        """`take`, but in each of these layers only when it next grows: so no more than one layer's
        rows stand there before the text that they are for."""
        self._rows_to_come.update(dict.fromkeys(layers, rows))
