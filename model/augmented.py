"""The augmented LM: a frozen LM that reads [perceptual token | soft prompt | text].

Paper, section 3.1, equation 1; conventions 1 to 7 of the official code. It departs from that code
in one point: attention is strictly causal, so the perceptual token at position 0 sees itself only
(`reference_mask` brings the official mask back). Prefix states then depend on the media alone, and
are computed once per media however many texts follow. `states`, for training, runs both in one
pass; for generation (`model.generation`), `perceive` runs the prefix, and `extend` text after it.

Shapes: B texts, M media, n encoder layers used, t perceptual tokens of each (1 but for MAGMA*), P
prompt tokens, T text tokens, D encoder width, H LM width, V vocabulary, S = t + P + T. Features
(M, n, t, D) may be given as (M, n, D) where t is 1, and those of several sources by name: see
`Features`.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from epalm.config import VariantConfig
from epalm.model.adapters import Adapters
from epalm.model.cache import PrefixCache
from epalm.model.connection import Connection, Connections, Features
from epalm.model.deep_prompt import DeepPrompt
from epalm.model.families import family_of
from epalm.model.generation import Generator
from epalm.model.injection import InjectionPlan
from epalm.model.layers import Layers, positions
from epalm.model.masks import joint_mask
from epalm.model.prefix import Prefix
from epalm.model.pretrained import PretrainedMixin
from epalm.model.room import Room
from epalm.model.soft_prompt import SoftPrompt
from epalm.model.spread import return_outputs
from epalm.model.text import Equal
from epalm.model.variant import make_adapters, make_connection, make_prompt, trains_lm


class AugmentedLM(PretrainedMixin, nn.Module):
    """A frozen LM with its trained parts in `trained`; nothing else is ever saved.

    Args:
        lm: any causal LM of a known family; its weights are frozen.
        plan: where perceptual tokens enter.
        connection: features to perceptual tokens; of several sources, one for each.
        prompt: soft or deep prompt; None for eP-ALM_lin.
        adapters: of eP-ALM_ada; None for the others.
        train_lm: the LM's weights are trained and saved too (table 12).
        reference_mask: let the perceptual token see everything (convention 7, bug 2).
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        plan: InjectionPlan,
        connection: Connection | Connections,
        prompt: SoftPrompt | DeepPrompt | None = None,
        adapters: Adapters | None = None,
        train_lm: bool = False,
        reference_mask: bool = False,
    ):
        super().__init__()
        return_outputs(lm)
        self.lm = lm.eval().requires_grad_(train_lm)
        self.family = family_of(lm)
        self.plan = plan
        self.layers = Layers(lm, self.family, plan, self._adapted)
        self.trained = nn.ModuleDict({"connection": connection})
        if prompt is not None:
            kind = "soft_prompt" if isinstance(prompt, SoftPrompt) else "deep_prompt"
            self.trained[kind] = prompt
        if adapters is not None:
            self.trained["adapters"] = adapters
        if train_lm:
            self.trained["lm"] = lm
        self.prompt_length = prompt.length if prompt is not None else 0
        self.reference_mask = reference_mask
        self.config = lm.config

    @classmethod
    def from_config(
        cls,
        lm: PreTrainedModel,
        variant: VariantConfig,
        encoder_layers: int,
        encoder_dim: int | Mapping[str, int],
    ) -> "AugmentedLM":
        """A recipe's variant on this LM, its trained parts in float32 on the LM's device.

        Args:
            encoder_layers: that the encoder has; of several, that all of them have.
            encoder_dim: D; of several sources, by name.

        Raises:
            EpalmError: what the LM or an encoder of this depth cannot have.
        """
        family = family_of(lm)
        plan = InjectionPlan.from_config(variant, len(family.layers), encoder_layers)
        model = cls(
            lm,
            plan,
            make_connection(variant, lm, encoder_dim),
            make_prompt(variant, family),
            make_adapters(variant, family),
            trains_lm(variant, lm),
            variant.mask == "reference",
        )
        model.trained.to(lm.device)
        return model

    @property
    def device(self) -> torch.device:
        return self.lm.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm.dtype

    def room(self, perceptual: int = 1) -> Room:
        """Places for text behind so many perceptual tokens of a media."""
        taken = perceptual + self.prompt_length if self.family.prefix_takes_places else 0
        return Room.of(self.config, taken)

    def states(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        features: Features,
        rows: torch.Tensor | None = None,
        equal: Equal | None = None,
        text_states: torch.Tensor | None = None,
        last: int | None = None,
    ) -> torch.Tensor:
        """States (B, T, H) of the text at the last layer, before the final norm.

        Args:
            input_ids: (B, T) token ids, padded on either side.
            attention_mask: (B, T) 1 for real tokens, 0 for pads.
            features: (M, n, t, D) of the media, ascending encoder layers.
            rows: (B,) which media each text is about; None: M = B, in order.
            equal: which texts are, for what they have in common is run once; None: all differ.
            text_states: (U, T, H) of the texts that differ as they enter the first injection layer,
                from `text_states`; what is below need not be run then. Not with the reference's
                mask.
            last: only those of the last so many tokens are wanted: (B, last, H).
        """
        if self.reference_mask:
            states = self.joint_states(input_ids, attention_mask, features, rows)
            return states[:, -(last or input_ids.shape[1]) :]
        if rows is None:
            rows = torch.arange(len(input_ids), device=self.device)
        layers, prefix = self.layers, self._prefix(features)
        front = prefix.prompts[0]
        if text_states is not None:
            text = text_states.to(self.dtype)
        else:
            ids, mask = input_ids, attention_mask
            if equal is not None:
                ids, mask = ids[equal.first], mask[equal.first]
            text = self.family.embed_text(ids, positions(mask))
            front, text = layers.packed(layers.lower, front, text, mask, prefix, prefix.of_text)
        if equal is not None:
            text = text[equal.row]
        front, text = layers.packed(layers.upper, front, text, attention_mask, prefix, rows)
        cache = PrefixCache(prefix.tokens.shape[2], self.prompt_length)
        layers.keep_keys(front, cache, prefix)
        cache.take_later(layers.last, rows)
        return layers.on_last(text, attention_mask, last, cache, prefix)

    def perceive(self, features: Features, rows: torch.Tensor | None = None) -> PrefixCache:
        """Run the prefix alone; what it leaves is for `extend`.

        Layers below the first injection layer have one row in the cache, since all media are the
        same to them; the others have one row per text.
        """
        layers, prefix = self.layers, self._prefix(features)
        cache = PrefixCache(prefix.tokens.shape[2], self.prompt_length)
        front = prefix.prompts[0]
        if self.prompt_length:
            front = layers.on_prefix(layers.lower, front, self.prompt_length, cache, prefix)
        front = layers.on_prefix(layers.upper, front, prefix.length, cache, prefix)
        layers.keep_keys(front, cache, prefix)
        cache.prefix_in_first_layer = cache.get_seq_length()
        if rows is not None:
            cache.take_later(layers.injected, rows)
        return cache

    def extend(
        self,
        cache: PrefixCache,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        equal: Equal | None = None,
        last: int | None = None,
    ) -> torch.Tensor:
        """Run text (B, Q) after the cache; states (B, Q, H).

        The first text after the prefix does not depend on the media below the first injection
        layer: there, equal texts run once.

        Args:
            cache: grows by Q.
            input_ids: (B, Q) the new tokens.
            attention_mask: (B, T) of all text, the new tokens last.
            equal: which texts are, where the first text is run; None: all differ.
            last: only the states of the last so many tokens are wanted: (B, last, H).
        """
        ids, mask, layers = input_ids, attention_mask, self.layers
        if equal is not None:
            ids, mask = ids[equal.first], mask[equal.first]
        if cache.get_seq_length() == 0:
            cache.take_later(layers.lower, ids.new_zeros(len(ids)))
        text = self.family.embed_text(ids, positions(mask)[:, -ids.shape[1] :])
        text = layers.on_text(layers.lower, text, mask, cache)
        if equal is not None:
            cache.take(layers.lower, equal.row)
            text = text[equal.row]
        if last is None or last >= text.shape[1]:
            return layers.on_text(layers.injected, text, attention_mask, cache)
        text = layers.on_text(layers.upper, text, attention_mask, cache)
        return layers.on_last(text, attention_mask, last, cache)

    def text_states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """States (B, T, H) of text entering the first injection layer, where only the frozen LM and
        the text make them (see `lower_is_frozen`)."""
        text = self.family.embed_text(input_ids, positions(attention_mask))
        return self.layers.on_text(self.layers.lower, text, attention_mask, None)

    @property
    def lower_is_frozen(self) -> bool:
        """Nothing below the first injection layer is trained, and something is there."""
        above = {"connection", "encoder"}
        if "adapters" in self.trained and self.trained["adapters"].start >= self.plan.start:
            above.add("adapters")
        return bool(self.layers.lower) and self.trained.keys() <= above

    def joint_states(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        features: Features,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the whole sequence at once, as the official code does: states (B, S, H).

        The only way with the reference's mask; with the causal one, a slower way to the same.
        """
        layers, prefix = self.layers, self._prefix(features, rows)
        tokens = prefix.tokens.shape[2]
        of_text = positions(attention_mask)
        text = self.family.embed_text(input_ids, of_text)
        hidden = torch.cat((prefix.prompts[0].expand(len(text), -1, -1), text), dim=1)
        places = torch.arange(prefix.length, device=self.device)
        for some, first in ((layers.lower, tokens), (layers.injected, 0)):
            mask = joint_mask(
                self.prompt_length, attention_mask, tokens - first, self.reference_mask
            )
            call = layers.call(hidden, places[first:], of_text, prefix.length, mask)
            hidden = layers.run(some, hidden, call, None, prefix.enter)
        return hidden

    def forward(self, *inputs: Any, **named: Any) -> CausalLMOutputWithPast:
        """Logits in Hugging Face's form; see `Generator.forward`."""
        return Generator(self).forward(*inputs, **named)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        features: Features,
        rows: torch.Tensor | None = None,
        use_cache: bool = True,
        **options: Any,
    ) -> Any:
        """Hugging Face's `generate` on left-padded prompts (B, T); ids (B, T + new tokens).

        With `num_return_sequences` the rows of a text follow one another, as there.

        Args:
            input_ids, features, rows: as in `states`.
            attention_mask: as in `states`; None: nothing is padded.
            use_cache: False recomputes the whole sequence for each token; the reference's mask
                leaves no other way.
            options: any of Hugging Face's `generate` (num_beams, do_sample, top_p, …).

        Raises:
            EpalmError: the LM has no room for so many tokens, or `rows` names media that are not
                there.
        """
        return Generator(self).generate_about(
            input_ids, attention_mask, features, rows, use_cache, **options
        )

    def _prefix(self, features: Features, rows: torch.Tensor | None = None) -> Prefix:
        """What stands before texts about media with these features; with `rows`, one for each."""
        tokens = self.perceptual_tokens(features)
        return Prefix(self.plan, tokens if rows is None else tokens[rows], self.prompts()[:, None])

    def perceptual_tokens(self, features: Features) -> torch.Tensor:
        """(M, n, t, H) in the LM's number format."""
        return self.trained["connection"](features).to(self.dtype)

    def prompts(self) -> torch.Tensor:
        """(1, P, H) the prompt that enters layer 0; with deep prompts (L, P, H)."""
        if "soft_prompt" in self.trained:
            words = self.trained["soft_prompt"]().to(self.dtype)
            return self.family.embed_prompt(words)[None]
        if "deep_prompt" in self.trained:
            return self.trained["deep_prompt"]().to(self.dtype)
        width = self.family.hidden_size
        return torch.empty(1, 0, width, dtype=self.dtype, device=self.device)

    def _adapted(self, layers: range, counts: Sequence[int] | None) -> AbstractContextManager[None]:
        """Within it, these layers run with their adapters."""
        if "adapters" not in self.trained:
            return nullcontext()
        return self.trained["adapters"].attached(self.family, layers)
