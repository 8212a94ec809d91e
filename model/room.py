"""How much text an LM has places for."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from transformers import GenerationConfig, PretrainedConfig

from epalm.errors import EpalmError
from epalm.model.text import TextCodec

_NEW_TOKENS = 20  # Hugging Face's default


class Room(NamedTuple):
    """Places of an LM: rows of its position table, or the longest sequence it was trained for.

    Attributes:
        positions: all that it has.
        taken: by perceptual and prompt tokens; none where they have no position.
    """

    positions: int
    taken: int

    @classmethod
    def of(cls, config: PretrainedConfig, taken: int) -> "Room":
        """An LM's; where layers see only the last tokens (a sliding window, as some of Mistral's
        and Qwen's have), it ends with their window, within which they see what all others see."""
        positions = config.max_position_embeddings
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
        if window and "sliding_attention" in kinds:
            positions = min(positions, window)
        return cls(positions, taken)

    def check_training(self, longest: int) -> None:
        """EpalmError when there is no room for so many tokens of a prompt and its answer."""
        if longest > self.positions - self.taken:
            raise EpalmError(
                f"text.max_prompt_tokens: the longest prompt with its answer has {longest} tokens, "
                f"but {self._words()}; shorten the text, or take another LM"
            )

    def check_generation(self, longest: int, new_tokens: int) -> None:
        """EpalmError when a prompt and new tokens have no room; the last of them is never read."""
        left = self.positions - self.taken - longest + 1
        if new_tokens > left:
            raise EpalmError(
                f"decode.max_new_tokens: {new_tokens} after a prompt of {longest} tokens, but "
                f"{self._words()}; lower it to {max(left, 0)}, or shorten the prompts "
                "(text.max_prompt_tokens)"
            )

    def check_prompts(self, codec: TextCodec, prompts: Iterable[str], new_tokens: int) -> None:
        """EpalmError when a prompt is longer than the recipe allows, or has no room.

        Nothing is tokenised where the recipe's limit is enough.
        """
        if codec.config.max_prompt_tokens + new_tokens - 1 > self.positions - self.taken:
            longest = max((len(codec.prompt(text)) for text in set(prompts)), default=0)
            self.check_generation(longest, new_tokens)

    def _words(self) -> str:
        taken = f", {self.taken} of them for perceptual and prompt tokens" if self.taken else ""
        return f"the LM has {self.positions} positions{taken}"


class Wanted(NamedTuple):
    """What options of Hugging Face's `generate` ask for.

    Attributes:
        new_tokens: at most.
        copies: rows that it makes of each text (beams, samples).
    """

    new_tokens: int
    copies: int

    @classmethod
    def of(
        cls, options: Mapping[str, Any], defaults: GenerationConfig, prompt_length: int
    ) -> "Wanted":
        """
        Args:
            options: keyword arguments, `generation_config` among them perhaps.
            defaults: the model's own.
            prompt_length: T, pads included.
        """
        defaults = options.get("generation_config") or defaults

        def option(name: str) -> Any:
            value = options.get(name)
            return getattr(defaults, name, None) if value is None else value

        new_tokens, length = option("max_new_tokens"), option("max_length")
        if new_tokens is None:
            new_tokens = _NEW_TOKENS if length is None else length - prompt_length
        return cls(new_tokens, max(option("num_beams") or 1, option("num_return_sequences") or 1))
