"""A start for connections: perceptual tokens like the LM's own states of the answers.

Ours, not the paper's (`train.connection_start: answers`). A frozen LM compares and copies words, so
perceptual tokens like states of words are of use to it from the first step on. For each connection,
ridge regression takes features to the states of their examples' answers as these enter the LM
layers that it feeds, the question before them and no perceptual token. It is solved in closed form,
in float64 on the CPU.
"""

import random
import time
from collections.abc import Sequence

import torch
from accelerate.utils import broadcast
from torch.nn.functional import rms_norm
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from epalm.config import Recipe
from epalm.data.example import Example
from epalm.data.grouping import chunks
from epalm.errors import EpalmError
from epalm.model.augmented import AugmentedLM
from epalm.model.connection import Connection, Connections
from epalm.store.stage import Stage
from epalm.train.parts import Parts

EXAMPLES = 4096  # a linear layer's start needs no more
AT_ONCE = 64  # texts
RIDGE = 0.01  # of the features' mean variance
GAIN = 2.0
"""On what sets media apart. Each example asks about one of the things that its media shows, such as
a colour or a shape, so that the regression has each of them fainter than its answer's own state."""
CLOSED = frozenset({"", "yes", "no"})
"""Answers that say nothing of what is seen unless one knows the question."""


def check_answers(examples: Sequence[Example], recipe: Recipe) -> None:
    """EpalmError when the training answers of one of the recipe's sources are all yes, no or
    empty."""
    answered = {e.source for e in examples if _open_answers(e)}
    for source in recipe.sources() if recipe.also else [""]:
        if source not in answered:
            raise EpalmError(
                "train.connection_start: no training answers but yes, no and empty ones"
                f"{f' in source {source}' if source else ''}; set it to random"
            )


@torch.no_grad()
def start_from_answers(parts: Parts, examples: Sequence[Example]) -> Stage:
    """Set the connections of all sources; a seeded choice of the examples is enough.

    Raises:
        EpalmError: as `check_answers` of all examples, of which these may be a few.
    """
    check_answers(examples, parts.recipe)
    begin, seed = time.perf_counter(), parts.recipe.seed
    of = parts.model.trained["connection"]
    connections = of.of.items() if isinstance(of, Connections) else [("", of)]
    draw = random.Random(f"{seed} answer start")
    used = 0
    for source, connection in connections:
        of_source = ((e, _open_answers(e)) for e in examples if e.source == source)
        own = [(e, draw.choice(answers)) for e, answers in of_source if answers]
        own = draw.sample(own, min(EXAMPLES, len(own)))
        _set(connection, _features(parts, own, source), _targets(parts, own))
        used += len(own)
    if parts.accelerator.num_processes > 1:  # sums on a GPU may differ in the last digits
        for parameter in of.parameters():
            parameter.copy_(broadcast(parameter.data))
    seconds = time.perf_counter() - begin
    return Stage(round(seconds, 2), f"{used / seconds:.1f} examples/s")


def _open_answers(example: Example) -> list[str]:
    """Those that say something of its media; of ten annotators one may have said nothing."""
    return [answer for answer in example.references if _plain(answer) not in CLOSED]


def _plain(answer: str) -> str:
    return answer.strip().strip(".!").casefold()


def _features(parts: Parts, pairs: Sequence[tuple[Example, str]], source: str) -> torch.Tensor:
    """(N, n, D), the mean over a level's tokens where it has several."""
    media = [e.media for e, _ in pairs]
    views = [min(parts.features.view_count(m), 1) for m in media]
    found = parts.features.fetch(media, views)
    features = (found[source] if isinstance(found, dict) else found).double().cpu()
    return features.mean(2) if features.ndim == 4 else features


def _targets(parts: Parts, pairs: Sequence[tuple[Example, str]]) -> torch.Tensor:
    """(N, n, H) the states that each level's tokens should be like, for each example."""
    codec = parts.codec
    split = {(e.prompt, a): (codec.prompt(e.prompt), codec.answer(a)[:-1]) for e, a in pairs}
    states: dict[tuple[str, str], torch.Tensor] = {}
    with tqdm(total=len(split), desc="start", unit="text", leave=False, disable=None) as bar:
        for some in chunks(list(split), AT_ONCE):
            states |= zip(
                some,
                _answer_states(parts.model, [split[text] for text in some], codec.pad),
                strict=True,
            )
            bar.update(len(some))
    return torch.stack([states[e.prompt, answer] for e, answer in pairs]).double()


def _answer_states(
    model: AugmentedLM, texts: Sequence[tuple[list[int], list[int]]], pad: int
) -> list[torch.Tensor]:
    """(n, H) of each text: of each level, the mean over the LM layers it feeds, and over the
    answer's tokens.

    The states are scaled to a mean square of 1 first: some layers' are hundreds of times longer
    than others'.

    Args:
        texts: ids of prompt and answer.
    """
    ids = [torch.tensor(prompt + answer) for prompt, answer in texts]
    padded = pad_sequence(ids, batch_first=True, padding_value=pad)  # on the right: places stay
    mask = pad_sequence([torch.ones_like(text) for text in ids], batch_first=True)
    entered = model.lm.base_model(
        input_ids=padded.to(model.device),
        attention_mask=mask.to(model.device),
        output_hidden_states=True,
    ).hidden_states
    source = model.plan.source
    fed = [
        [layer for layer, level in enumerate(source) if level == n]
        for n in range(model.trained["connection"].levels)
    ]
    found = []
    for row, (prompt, answer) in enumerate(texts):
        place = slice(len(prompt), len(prompt) + len(answer))
        scaled = [
            torch.stack([entered[layer][row, place].float().cpu() for layer in layers])
            for layers in fed
        ]
        found.append(torch.stack([rms_norm(s, s.shape[-1:]).mean((0, 1)) for s in scaled]))
    return found


def _set(connection: Connection, features: torch.Tensor, targets: torch.Tensor) -> None:
    """Features (N, n, D) and targets (N, n, H) by level; all levels at once where it is shared."""
    shared = len(connection.linears) == 1
    for level, linear in enumerate(connection.linears):
        inputs, outputs = (t.flatten(0, 1) if shared else t[:, level] for t in (features, targets))
        weight, bias = _ridge(inputs, outputs)
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)


def _ridge(inputs: torch.Tensor, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (H, D) and bias (H,) from inputs (N, D) to outputs (N, H); the mean is met."""
    middle, level = inputs.mean(0), outputs.mean(0)
    if (inputs == inputs[0]).all():  # one media: nothing to regress on, and the matrix is singular
        return torch.zeros(outputs.shape[1], inputs.shape[1]).double(), level
    centred = inputs - middle
    covariance = centred.T @ centred
    covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance)).double()
    weight = GAIN * torch.linalg.solve(covariance, centred.T @ (outputs - level)).T
    return weight, level - weight @ middle
