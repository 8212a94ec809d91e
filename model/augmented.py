"""The augmented LM: a frozen LM that reads [perceptual token | soft prompt | text].

Paper, section 3.1, equation 1; conventions 1 to 7 of the official code. It departs from that code
in one point: attention is strictly causal, so the perceptual token at position 0 sees itself only
(`reference_mask` brings the official mask back). Prefix states then depend on the media alone, and
are computed once per media however many texts follow: `perceive` runs the prefix, `extend` runs
text on top of it. Generation uses the same two.

Shapes: B texts, M media, n perceptual tokens, P prompt tokens, T text tokens, D encoder width, H LM
width, V vocabulary, S = 1 + P + T.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from epalm.config import VariantConfig
from epalm.model.connection import Connection
from epalm.model.families import family_of
from epalm.model.injection import InjectionPlan
from epalm.model.masks import joint_mask, prefix_mask, text_mask
from epalm.model.soft_prompt import SoftPrompt


class PrefixCache(DynamicCache):
    """Keys and values of the prefix, then of the text; its length counts the text alone.

    Layers below the first injection layer hold P prefix states, the others 1 + P.
    """

    prefix_in_first_layer = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        if layer_idx != 0:
            raise ValueError("only the first layer's text length is defined")
        return super().get_seq_length(0) - self.prefix_in_first_layer

    def take(self, layers: range, rows: torch.Tensor) -> None:
        """In these layers, let row b become what row `rows[b]` was."""
        for layer in self.layers[layers.start : layers.stop]:
            if layer.is_initialized:
                layer.keys = layer.keys.index_select(0, rows)
                layer.values = layer.values.index_select(0, rows)


class AugmentedLM(nn.Module, GenerationMixin):
    """A frozen LM with its trained parts in `trained`; nothing else is ever saved.

    Args:
        lm: any causal LM of a known family; its weights are frozen.
        plan: where perceptual tokens enter.
        connection: (M, n, D) features to (M, n, H) tokens.
        soft_prompt: None for eP-ALM_lin.
        reference_mask: let the perceptual token see everything (convention 7, bug 2).
    """

    main_input_name = "input_ids"
    _is_stateful = False

    def __init__(
        self,
        lm: PreTrainedModel,
        plan: InjectionPlan,
        connection: Connection,
        soft_prompt: SoftPrompt | None,
        reference_mask: bool = False,
    ):
        super().__init__()
        self.lm = lm.eval().requires_grad_(False)
        self.family = family_of(lm)
        self.plan = plan
        self.lower = range(plan.start)
        self.upper = range(plan.start, len(plan.source))
        self.trained = nn.ModuleDict({"connection": connection})
        if soft_prompt is not None:
            self.trained["soft_prompt"] = soft_prompt
        self.prompt_length = soft_prompt.embedding.num_embeddings if soft_prompt is not None else 0
        self.reference_mask = reference_mask
        self.config = lm.config
        self.generation_config = deepcopy(lm.generation_config)

    @classmethod
    def from_config(
        cls, lm: PreTrainedModel, variant: VariantConfig, encoder_layers: int, encoder_dim: int
    ) -> "AugmentedLM":
        """A recipe's variant on this LM, its trained parts in float32 on the LM's device."""
        family = family_of(lm)
        plan = InjectionPlan.from_config(variant, len(family.layers), encoder_layers)
        connection = Connection(
            variant.encoder_layers,
            encoder_dim,
            family.hidden_size,
            shared=variant.connection == "shared",
        )
        prompt = None
        if variant.prompt_length:
            prompt = SoftPrompt(variant.prompt_length, family.prompt_width, variant.prompt_mlp)
        model = cls(lm, plan, connection, prompt, variant.mask == "reference")
        model.trained.to(lm.device)
        return model

    @property
    def device(self) -> torch.device:
        return self.lm.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm.dtype

    def __getattr__(self, name: str) -> Any:
        """What Hugging Face's generation asks of a model beyond this class, the LM answers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("lm"), name)

    def states(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        features: torch.Tensor,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """States (B, T, H) of the text at the last layer, before the final norm.

        Args:
            input_ids: (B, T) token ids, padded on either side.
            attention_mask: (B, T) 1 for real tokens, 0 for pads.
            features: (M, n, D) of the media, ascending encoder layers.
            rows: (B,) which media each text is about; None: M = B, in order.
        """
        if self.reference_mask:
            own = features if rows is None else features[rows]
            return self.joint_states(input_ids, attention_mask, own)[:, 1 + self.prompt_length :]
        cache = self.perceive(features, rows)
        return self.extend(cache, input_ids, attention_mask, keep_cache=False)

    def perceive(self, features: torch.Tensor, rows: torch.Tensor | None = None) -> PrefixCache:
        """Run the prefix alone; what it leaves is for `extend`.

        Layers below the first injection layer have one row in the cache, since all media are the
        same to them; the others have one row per text.
        """
        tokens = self.trained["connection"](features).to(self.dtype)
        cache = PrefixCache()
        places = torch.arange(1 + self.prompt_length, device=self.device)
        no_text = places.new_zeros((1, 0))
        prompt = self._prompt_states()
        lower = self._call(prompt, places[1:], no_text, prefix_mask(len(places) - 1, self.device))
        upper = self._call(prompt, places, no_text, prefix_mask(len(places), self.device))
        hidden = self._run(self.lower, prompt, lower, cache) if self.prompt_length else prompt
        self._run(self.upper, hidden, upper, cache, tokens)
        cache.prefix_in_first_layer = cache.get_seq_length()
        if rows is not None:
            cache.take(self.upper, rows)
        return cache

    def extend(
        self,
        cache: PrefixCache,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        keep_cache: bool = True,
    ) -> torch.Tensor:
        """Run text (B, Q) after the cache; states (B, Q, H).

        The first text after the prefix does not depend on the media below the first injection
        layer: there, equal texts run once.

        Args:
            cache: grows by Q.
            input_ids: (B, Q) the new tokens.
            attention_mask: (B, T) of all text, the new tokens last.
            keep_cache: False when nothing will be run after this text.
        """
        queries = input_ids.shape[1]
        upper_mask = text_mask(1 + self.prompt_length, attention_mask, queries)
        positions = _positions(attention_mask)
        ids, upper_positions = input_ids, positions[:, -queries:]
        equal_to = None
        if self.lower and cache.get_seq_length() == 0:
            texts, equal_to = torch.stack((ids, attention_mask)).unique(dim=1, return_inverse=True)
            ids, attention_mask = texts
            cache.take(self.lower, ids.new_zeros(len(ids)))
            positions = _positions(attention_mask)
        positions = positions[:, -queries:]
        hidden = self.family.embed_text(ids, positions)
        no_places = positions.new_zeros(0)
        lower_mask = text_mask(self.prompt_length, attention_mask, queries)
        lower = self._call(hidden, no_places, positions, lower_mask)
        hidden = self._run(self.lower, hidden, lower, cache)
        if equal_to is not None:
            hidden = hidden[equal_to]
            if keep_cache:
                cache.take(self.lower, equal_to)
        upper = self._call(hidden, no_places, upper_positions, upper_mask)
        return self._run(self.upper, hidden, upper, cache)

    def joint_states(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, features: torch.Tensor
    ) -> torch.Tensor:
        """Run the whole sequence at once, as the official code does: states (B, S, H).

        The only way with the reference's mask; with the causal one, a slower way to the same.
        Here M = B.
        """
        tokens = self.trained["connection"](features).to(self.dtype)
        positions = _positions(attention_mask)
        text = self.family.embed_text(input_ids, positions)
        hidden = torch.cat((self._prompt_states().expand(len(text), -1, -1), text), dim=1)
        places = torch.arange(1 + self.prompt_length, device=self.device)
        masks = [
            joint_mask(self.prompt_length, attention_mask, token, self.reference_mask)
            for token in (False, True)
        ]
        lower = self._call(hidden, places[1:], positions, masks[0])
        upper = self._call(hidden, places, positions, masks[1])
        hidden = self._run(self.lower, hidden, lower, None)
        return self._run(self.upper, hidden, upper, None, tokens)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        past_key_values: PrefixCache | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, Q, V), in the form Hugging Face's generation expects.

        Either `features` (B, n, D) or a cache from `perceive` must be given; other keyword
        arguments of Hugging Face models have no meaning here.
        """
        if attention_mask is None:  # as Hugging Face leaves it when nothing is padded
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            attention_mask = input_ids.new_ones(len(input_ids), past + input_ids.shape[1])
        if past_key_values is not None:
            hidden = self.extend(past_key_values, input_ids, attention_mask)
        elif features is not None:
            hidden = self.states(input_ids, attention_mask, features)
        else:
            raise ValueError("give features, or a cache made by perceive()")
        return CausalLMOutputWithPast(
            logits=self.family.logits(hidden[:, -logits_to_keep:]), past_key_values=past_key_values
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        features: torch.Tensor,
        rows: torch.Tensor | None = None,
        use_cache: bool = True,
        num_beams: int = 1,
        **options: Any,
    ) -> torch.Tensor:
        """Hugging Face's `generate` on left-padded prompts (B, T); ids (B, T + new tokens).

        Args:
            input_ids, attention_mask, features, rows: as in `states`.
            use_cache: False recomputes the whole sequence for each token; the reference's mask
                leaves no other way.
            num_beams: beams per text.
            options: any further option of Hugging Face's `generate`.
        """
        if rows is None:
            rows = torch.arange(len(input_ids), device=input_ids.device)
        source: dict[str, Any]
        if use_cache and not self.reference_mask:
            cache = self.perceive(features, rows.repeat_interleave(num_beams))
            source = {"past_key_values": cache, "use_cache": True}
        else:
            source = {"features": features[rows], "use_cache": False}
        return super().generate(
            input_ids, attention_mask=attention_mask, num_beams=num_beams, **source, **options
        )

    def _prompt_states(self) -> torch.Tensor:
        """The soft prompt entering layer 0: (1, P, H)."""
        if "soft_prompt" not in self.trained:
            width = self.family.hidden_size
            return torch.empty(1, 0, width, dtype=self.dtype, device=self.device)
        return self.family.embed_prompt(self.trained["soft_prompt"]().to(self.dtype))[None]

    def _call(
        self,
        hidden: torch.Tensor,
        places: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor,
    ) -> dict[str, Any]:
        """Keyword arguments of a layer call."""
        extra = self.family.layer_arguments(hidden, places, positions, 1 + self.prompt_length)
        return {"attention_mask": mask, **extra}

    def _run(
        self,
        layers: range,
        hidden: torch.Tensor,
        call: dict[str, Any],
        cache: PrefixCache | None,
        tokens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Some of the LM's layers, one after the other; the only place where they are called.

        Args:
            layers: `self.lower` or `self.upper`.
            hidden: (B, S, H) entering the first of them.
            call: their keyword arguments.
            cache: grows in every layer.
            tokens: (M, n, H) perceptual tokens to inject; None: they are in the cache already.
        """
        for index in layers:
            source = self.plan.source[index]
            if tokens is not None and source is not None:
                rest = hidden if index == self.plan.start else hidden[:, 1:]
                rest = rest.expand(len(tokens), -1, -1)
                hidden = torch.cat((tokens[:, source, None], rest), dim=1)
            hidden = self.family.layers[index](
                hidden, past_key_values=cache, use_cache=cache is not None, **call
            )
        return hidden


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Place of each real token among its row's, from 0; pads have -1 (convention 6)."""
    return mask.cumsum(dim=1) * mask - 1
