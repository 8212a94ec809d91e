"""The augmented LM as Hugging Face's `generate` sees it: a causal LM, whose prefix is in its cache.

Shapes as in `model.augmented`.
"""

from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from epalm.device import send
from epalm.errors import EpalmError
from epalm.model.attention import own_attention
from epalm.model.cache import CACHE, PrefixCache
from epalm.model.connection import Features, media_of, to_device, tokens_of
from epalm.model.linears import own_linears
from epalm.model.room import Wanted
from epalm.model.text import Equal

if TYPE_CHECKING:
    from epalm.model.augmented import AugmentedLM

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class Generator(GenerationMixin):
    """What Hugging Face's generation asks of a model; beyond this class, the frozen LM answers."""

    main_input_name = "input_ids"
    _is_stateful = False

    def __init__(self, model: "AugmentedLM"):
        self.model, self.lm = model, model.lm
        # its ids alone: a chat model's repetition penalty, say, would alter answers unasked
        ids = {key: getattr(self.lm.generation_config, key) for key in _IDS}
        self.generation_config = GenerationConfig(**ids)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["lm"], name)

    def __call__(self, *inputs: Any, **named: Any) -> CausalLMOutputWithPast:
        return self.forward(*inputs, **named)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        features: Features | None = None,
        cache: PrefixCache | None = None,
        past_key_values: PrefixCache | None = None,
        logits_to_keep: int = 0,
        rows: torch.Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, Q, V) of Q new tokens, or of the last `logits_to_keep` of them.

        Either `features`, with `rows` as in `states`, or a cache from `perceive` must be given;
        `past_key_values` is its name until transformers 5.23. Other keyword arguments of Hugging
        Face models have no meaning here.
        """
        model = self.model
        if cache is None:
            cache = past_key_values
        if attention_mask is None:  # as Hugging Face leaves it when nothing is padded
            past = cache.get_seq_length() if cache is not None else 0
            attention_mask = input_ids.new_ones(len(input_ids), past + input_ids.shape[1])
        if cache is None and features is None:
            raise ValueError("give features, or a cache made by perceive()")
        with own_attention(self.lm), own_linears(self.lm, input_ids.numel()):
            if cache is not None:
                equal, cache.equal = cache.equal, None
                last = logits_to_keep or None
                hidden = model.extend(cache, input_ids, attention_mask, equal, last)
            else:
                hidden = model.states(input_ids, attention_mask, features, rows)
            logits = model.family.logits(hidden[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, **{CACHE: cache})

    def generate_about(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        features: Features,
        rows: torch.Tensor | None,
        use_cache: bool,
        **options: Any,
    ) -> Any:
        """See `AugmentedLM.generate`."""
        model = self.model
        input_ids, features = send(input_ids, model.device), to_device(features, model.device)
        media = media_of(features)
        if rows is None:
            rows = torch.arange(len(input_ids))
        if len(rows) != len(input_ids) or not all(0 <= row < media for row in rows.tolist()):
            raise EpalmError(
                f"rows: {rows.tolist()} for {len(input_ids)} prompts, and features of {media} "
                "media; give each prompt the number of its media, from 0"
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        rows, attention_mask = (send(t, model.device) for t in (rows, attention_mask))
        wanted = Wanted.of(options, self.generation_config, input_ids.shape[1])
        room = model.room(tokens_of(features))
        room.check_generation(int(attention_mask.sum(dim=1).max()), wanted.new_tokens)
        source: dict[str, Any]
        if use_cache and not model.reference_mask:
            with own_attention(self.lm), own_linears(self.lm, input_ids.numel()):
                cache = model.perceive(features, rows.repeat_interleave(wanted.copies))
            texts = map(tuple, torch.cat((input_ids, attention_mask), dim=1).tolist())
            cache.equal = Equal.among(texts, model.device).repeat(wanted.copies)
            source = {CACHE: cache, "use_cache": True}
        elif isinstance(features, torch.Tensor):
            source = {"features": features[rows], "use_cache": False}
        else:  # Hugging Face repeats tensors for each beam, and leaves a mapping alone
            source = {"features": features, "rows": rows, "use_cache": False}
        return self.generate(input_ids, attention_mask=attention_mask, **source, **options)
