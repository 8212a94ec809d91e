"""Mistral, Qwen2 and Qwen3: Llama-like, where some layers may see only the last tokens (a window).

Within the window they see what every other LM sees, so nothing is to be done; a sequence of prefix
and text that is longer is refused. Most checkpoints have no window, or one of thousands of tokens.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from epalm.errors import EpalmError
from epalm.model.families.llama import LlamaFamily


class WindowedFamily(LlamaFamily):
    """See `LMFamily`."""

    def __init__(self, lm: PreTrainedModel):
        super().__init__(lm)
        kinds = getattr(lm.config, "layer_types", None) or ["sliding_attention"]
        self.window = lm.config.sliding_window if "sliding_attention" in kinds else None

    def layer_arguments(
        self, hidden: torch.Tensor, prefix_places: torch.Tensor, text_positions: torch.Tensor,
        prefix_length: int,
    ) -> dict[str, Any]:  # fmt: skip
        if self.window is not None:  # the longest row decides; on a GPU this waits for it
            last = int(text_positions.max()) if text_positions.numel() else -1
            if prefix_length + last >= self.window:
                raise EpalmError(
                    f"lm.weights: {prefix_length + last + 1} tokens (prefix and text), but this "
                    f"LM's sliding window is {self.window}; shorten the text or the soft prompt, "
                    "or take an LM without a sliding window"
                )
        return super().layer_arguments(hidden, prefix_places, text_positions, prefix_length)
