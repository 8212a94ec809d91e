"""The augmented LM: a frozen LM that reads [perceptual token | soft prompt | text].

Paper, section 3.1, equation 1; conventions 1 to 7 of the official code. It departs from that code
in one point: attention is strictly causal, so the perceptual token at position 0 sees itself only
(`reference_mask` brings the official mask back). Prefix states then depend on the media alone, and
are computed once per media however many texts follow: `perceive` runs the prefix, `extend` runs
text on top of it. Generation (`model.generation`) uses the same two.

Shapes: B texts, M media, n encoder layers used, t perceptual tokens of each (1 but for MAGMA*), P
prompt tokens, T text tokens, D encoder width, H LM width, V vocabulary, S = t + P + T. Features
(M, n, t, D) may be given as (M, n, D) where t is 1, and those of several sources by name: see
`Features`.
"""

from collections.abc import Mapping
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
from epalm.model.masks import joint_mask, prefix_mask, text_mask
from epalm.model.prefix import Prefix
from epalm.model.pretrained import PretrainedMixin
from epalm.model.room import Room
from epalm.model.soft_prompt import SoftPrompt
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
        self.lm = lm.eval().requires_grad_(train_lm)
        self.family = family_of(lm)
        self.plan = plan
        self.lower = range(plan.start)
        self.upper = range(plan.start, len(plan.source))
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
            equal: as in `extend`.
            text_states: as in `extend`; no meaning with the reference's mask.
            last: only those of the last so many tokens are wanted: (B, last, H).
        """
        if self.reference_mask:
            states = self.joint_states(input_ids, attention_mask, features, rows)
            return states[:, -(last or input_ids.shape[1]) :]
        cache = self.perceive(features, rows)
        return self.extend(cache, input_ids, attention_mask, False, equal, text_states, last)

    def perceive(self, features: Features, rows: torch.Tensor | None = None) -> PrefixCache:
        """Run the prefix alone; what it leaves is for `extend`.

        Layers below the first injection layer have one row in the cache, since all media are the
        same to them; the others have one row per text.
        """
        prefix = self._prefix(features)
        cache = PrefixCache()
        cache.perceptual = prefix.tokens.shape[2]
        places = torch.arange(cache.perceptual + self.prompt_length, device=self.device)
        no_text = places.new_zeros((1, 0))
        hidden = prefix.prompts[0]
        if self.prompt_length:
            lower = self._call(hidden, places[cache.perceptual :], no_text, len(places),
                               prefix_mask(self.prompt_length, self.device))  # fmt: skip
            hidden = self._run(self.lower, hidden, lower, cache, prefix)
        upper = self._call(hidden, places, no_text, len(places),
                           prefix_mask(len(places), self.device))  # fmt: skip
        hidden = self._run(self.upper[:-1], hidden, upper, cache, prefix)
        with cache.keys_only():
            self._run(self.upper[-1:], hidden, upper, cache, prefix)
        cache.prefix_in_first_layer = cache.get_seq_length()
        if rows is not None:
            cache.take_later(self.upper, rows)
        return cache

    def extend(
        self,
        cache: PrefixCache,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        keep_cache: bool = True,
        equal: Equal | None = None,
        text_states: torch.Tensor | None = None,
        last: int | None = None,
    ) -> torch.Tensor:
        """Run text (B, Q) after the cache; states (B, Q, H).

        The first text after the prefix does not depend on the media below the first injection
        layer: there, equal texts run once.

        Args:
            cache: grows by Q.
            input_ids: (B, Q) the new tokens.
            attention_mask: (B, T) of all text, the new tokens last.
            keep_cache: False when nothing will be run after this text.
            equal: which texts are, where the first text is run; None: all differ.
            text_states: (U, Q, H) of the texts that differ as they enter the first injection layer,
                from `text_states`; what is below need not be run then. Not with `keep_cache`.
            last: only the states of the last so many tokens are wanted: (B, last, H).
        """
        queries, length = input_ids.shape[1], cache.perceptual + self.prompt_length
        positions = _positions(attention_mask)[:, -queries:]
        no_places = positions.new_zeros(0)
        if text_states is not None:
            hidden = text_states.to(self.dtype)
        else:
            hidden = self._run_lower(cache, input_ids, attention_mask, equal)
            if equal is not None and keep_cache:
                cache.take(self.lower, equal.row)
        if equal is not None:
            hidden = hidden[equal.row]
        mask = text_mask(length, attention_mask, queries)
        upper = self._call(hidden, no_places, positions, length, mask)
        if last is None or last >= queries:
            return self._run(self.upper, hidden, upper, cache)
        hidden = self._run(self.upper[:-1], hidden, upper, cache)
        for part in (slice(None, -last), slice(-last, None)):
            mask_of_part = mask[:, :, part, : mask.shape[3] + (part.stop or 0)]
            top = self._call(hidden[:, part], no_places, positions[:, part], length, mask_of_part)
            with cache.keys_only() if part.stop else nullcontext():
                states = self._run(self.upper[-1:], hidden[:, part], top, cache)
        return states

    def text_states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """States (B, T, H) of text entering the first injection layer, where only the frozen LM and
        the text make them (see `lower_is_frozen`)."""
        return self._run_lower(None, input_ids, attention_mask, None)

    @property
    def lower_is_frozen(self) -> bool:
        """Nothing below the first injection layer is trained, and something is there."""
        above = {"connection", "encoder"}
        if "adapters" in self.trained and self.trained["adapters"].start >= self.plan.start:
            above.add("adapters")
        return bool(self.lower) and self.trained.keys() <= above

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
        prefix = self._prefix(features, rows)
        tokens = prefix.tokens.shape[2]
        positions = _positions(attention_mask)
        text = self.family.embed_text(input_ids, positions)
        hidden = torch.cat((prefix.prompts[0].expand(len(text), -1, -1), text), dim=1)
        places = torch.arange(tokens + self.prompt_length, device=self.device)
        for layers, first in ((self.lower, tokens), (self.upper, 0)):
            mask = joint_mask(
                self.prompt_length, attention_mask, tokens - first, self.reference_mask
            )
            call = self._call(hidden, places[first:], positions, len(places), mask)
            hidden = self._run(layers, hidden, call, None, prefix)
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
            EpalmError: the LM has no room for so many tokens.
        """
        return Generator(self).generate_about(
            input_ids, attention_mask, features, rows, use_cache, **options
        )

    def _run_lower(
        self,
        cache: PrefixCache | None,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        equal: Equal | None,
    ) -> torch.Tensor:
        """States (U, Q, H) entering the first injection layer, of the texts that differ.

        Arguments as in `extend`; without a cache there is no prompt.
        """
        if equal is not None:
            input_ids, attention_mask = input_ids[equal.first], attention_mask[equal.first]
        queries = input_ids.shape[1]
        if cache is not None and cache.get_seq_length() == 0:
            only = input_ids.new_zeros(len(input_ids))
            cache.take_later(self.lower, only if cache.owner is None else cache.owner)
        positions = _positions(attention_mask)[:, -queries:]
        hidden = self.family.embed_text(input_ids, positions)
        tokens = cache.perceptual if cache is not None else 0
        mask = text_mask(self.prompt_length, attention_mask, queries)
        lower = self._call(
            hidden, positions.new_zeros(0), positions, tokens + self.prompt_length, mask
        )
        return self._run(self.lower, hidden, lower, cache)

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

    def _call(
        self,
        hidden: torch.Tensor,
        places: torch.Tensor,
        positions: torch.Tensor,
        length: int,
        mask: torch.Tensor,
    ) -> dict[str, Any]:
        """Keyword arguments of a layer call; `length` is t + P."""
        extra = self.family.layer_arguments(hidden, places, positions, length)
        return {"attention_mask": mask, **extra}

    def _run(
        self,
        layers: range,
        hidden: torch.Tensor,
        call: dict[str, Any],
        cache: PrefixCache | None,
        prefix: Prefix | None = None,
    ) -> torch.Tensor:
        """Some of the LM's layers, one after the other; the only place where they are called.

        Args:
            layers: `self.lower` or `self.upper`.
            hidden: (B, S, H) entering the first of them.
            call: their keyword arguments.
            cache: grows in every layer.
            prefix: what `hidden` has before the text; None: it is in the cache already.
        """
        adapted: AbstractContextManager[None] = nullcontext()
        if "adapters" in self.trained:
            adapted = self.trained["adapters"].attached(self.family, layers)
        with adapted:
            for index in layers:
                if prefix is not None:
                    hidden = prefix.enter(index, hidden)
                hidden = self.family.layers[index](
                    hidden, past_key_values=cache, use_cache=cache is not None, **call
                )
        return hidden


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Place of each real token among its row's, from 0; pads have -1 (convention 6)."""
    return mask.cumsum(dim=1) * mask - 1
