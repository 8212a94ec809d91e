"""Batched answers to the prompts of examples."""

import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers.generation.streamers import BaseStreamer

from epalm.config import DecodeConfig
from epalm.data.example import Example
from epalm.data.grouping import unique_rows
from epalm.evaluate.order import evaluation_batches
from epalm.evaluate.partial import PartialAnswers
from epalm.extract.lookup import FeatureTable
from epalm.extract.sources import SourceTables
from epalm.model.augmented import AugmentedLM
from epalm.model.connection import Features, to_device
from epalm.model.text import TextCodec, pad_left
from epalm.train.online import OnlineFeatures


def generate_answers(
    model: AugmentedLM,
    codec: TextCodec,
    features: FeatureTable | SourceTables | OnlineFeatures,
    examples: Sequence[Example],
    decode: DecodeConfig,
    media_of: Mapping[str, str] | None = None,
    label: str = "generate",
    accelerator: Accelerator | None = None,
    partial: PartialAnswers | None = None,
) -> list[str]:
    """One answer per example, in order.

    Args:
        media_of: media id shown in the place of each example's own; the shuffled control.
        label: of the progress bar.
        accelerator: of several processes, which share the batches and all get all answers.
        partial: answers that are there already, to which new ones are added as they come.
    """
    place, places = 0, 1
    if accelerator is not None:
        place, places = accelerator.process_index, accelerator.num_processes
    shown = [e.media if media_of is None else media_of[e.media] for e in examples]
    length_of = {text: len(codec.prompt(text)) for text in {e.prompt for e in examples}}
    lengths = [length_of[e.prompt] for e in examples]
    batches = evaluation_batches([e.source for e in examples], shown, lengths, decode.batch_size)
    answers = dict(partial.answers) if partial is not None else {}
    mine: list[tuple[int, Sequence[int]]] = []
    for number, batch in enumerate(batches):
        missing = [i for i in batch if i not in answers]
        if number % places == place and missing:
            # a draw depends on the whole batch
            mine.append((number, batch if decode.do_sample else missing))
    seen = [unique_rows(shown[i] for i in chosen) for _, chosen in mine]
    ahead = [*(media for media, _ in seen[1:]), []]
    with tqdm(total=len(examples), desc=label, unit="example", disable=place > 0) as bar:
        for (number, chosen), (media, rows), after in zip(mine, seen, ahead, strict=False):
            start = time.perf_counter()
            texts = generate_texts(
                model,
                codec,
                [examples[i].prompt for i in chosen],
                _fetch(features, media, after),
                rows,
                decode,
                number,
            )
            new = dict(zip(chosen, texts, strict=True))
            answers |= new
            if partial is not None:
                partial.add(new, time.perf_counter() - start)
            # with those that are answered already, and that other processes answer meanwhile
            bar.update(min((number + 1) * decode.batch_size, len(examples)) - bar.n)
        bar.update(len(examples) - bar.n)
    if places > 1:
        answers = dict(gather_object(list(answers.items())))
    return [answers[i] for i in range(len(examples))]


def _fetch(
    features: FeatureTable | SourceTables | OnlineFeatures,
    media: Sequence[str],
    ahead: Sequence[str],
) -> Features:
    """Features of media; those that are decoded when they are asked for are told what is next."""
    if isinstance(features, OnlineFeatures):
        return features.fetch(media, ahead=ahead)
    return features.fetch(media)


def generate_texts(
    model: AugmentedLM,
    codec: TextCodec,
    prompts: Sequence[str],
    features: Features,
    rows: Sequence[int],
    decode: DecodeConfig,
    batch: int = 0,
    streamer: BaseStreamer | None = None,
) -> list[str]:
    """Answers to B prompts about M media.

    Args:
        rows: (B,) which of the media each prompt is about.
        batch: number of the batch, for its draws; those of all others remain what they would be.
        streamer: of one prompt without beams, is given the tokens as they come.
    """
    ids, mask = pad_left([codec.prompt(text) for text in prompts], codec.pad)
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        if decode.do_sample:
            torch.manual_seed(random.Random(f"{decode.seed} draws {batch}").getrandbits(63))
        generated = model.generate(
            ids.to(model.device),
            mask.to(model.device),
            to_device(features, model.device),
            torch.tensor(list(rows), device=model.device),
            eos_token_id=codec.eos,
            pad_token_id=codec.pad,
            streamer=streamer,
            **generation_options(decode),
        )
    return [codec.decode(row) for row in generated[:, ids.shape[1] :].tolist()]


def generation_options(decode: DecodeConfig) -> dict[str, Any]:
    """The keyword arguments of Hugging Face's `generate`, all of them said, so that no default of
    the LM's own matters."""
    options: dict[str, Any] = {
        "num_beams": decode.num_beams,
        "max_new_tokens": decode.max_new_tokens,
        "length_penalty": decode.length_penalty if decode.num_beams > 1 else None,
        "do_sample": decode.do_sample,
    }
    if decode.do_sample:
        options["temperature"] = 1.0 if decode.temperature is None else decode.temperature
        options["top_k"] = 50 if decode.top_k is None else decode.top_k
        options["top_p"] = 1.0 if decode.top_p is None else decode.top_p
    return options
