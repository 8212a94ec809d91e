"""Batched answers to the prompts of examples."""

from collections.abc import Mapping, Sequence

import torch
from tqdm import tqdm

from epalm.config import DecodeConfig
from epalm.data.example import Example
from epalm.data.grouping import chunks, unique_rows
from epalm.extract.lookup import FeatureTable
from epalm.model.augmented import AugmentedLM
from epalm.model.text import TextCodec, pad_left


def generate_answers(
    model: AugmentedLM,
    codec: TextCodec,
    features: FeatureTable,
    examples: Sequence[Example],
    decode: DecodeConfig,
    media_of: Mapping[str, str] | None = None,
    label: str = "generate",
) -> list[str]:
    """One answer per example, in order.

    Args:
        media_of: media id shown in the place of each example's own; the shuffled control.
        label: of the progress bar.
    """
    shown = [e.media if media_of is None else media_of[e.media] for e in examples]
    # examples about one media stand together, so that its prefix runs once for all of them
    order = sorted(range(len(examples)), key=lambda i: shown[i])
    answers = [""] * len(examples)
    with tqdm(total=len(examples), desc=label, unit="example") as bar:
        for chosen in chunks(order, decode.batch_size):
            media, rows = unique_rows(shown[i] for i in chosen)
            texts = generate_texts(
                model,
                codec,
                [examples[i].prompt for i in chosen],
                features.fetch(media),
                rows,
                decode,
            )
            for index, text in zip(chosen, texts, strict=True):
                answers[index] = text
            bar.update(len(chosen))
    return answers


def generate_texts(
    model: AugmentedLM,
    codec: TextCodec,
    prompts: Sequence[str],
    features: torch.Tensor,
    rows: Sequence[int],
    decode: DecodeConfig,
) -> list[str]:
    """Greedy or beam answers to B prompts about M media with features (M, n, [t,] D)."""
    ids, mask = pad_left([codec.prompt(text) for text in prompts], codec.pad)
    generated = model.generate(
        ids.to(model.device),
        mask.to(model.device),
        features.to(model.device),
        torch.tensor(list(rows), device=model.device),
        num_beams=decode.num_beams,
        max_new_tokens=decode.max_new_tokens,
        length_penalty=decode.length_penalty if decode.num_beams > 1 else None,
        do_sample=False,
        eos_token_id=codec.eos,
        pad_token_id=codec.pad,
    )
    return [codec.decode(row) for row in generated[:, ids.shape[1] :].tolist()]
