"""Answers about many files, of which some may be broken."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from epalm.data.grouping import chunks
from epalm.data.media import Media
from epalm.errors import EpalmError
from epalm.evaluate.predict import Predictor
from epalm.evaluate.predict_inputs import Asked
from epalm.extract.workers import DecodePool, Task, prepare_workers


class Answered(NamedTuple):
    """Answers to each of the prompts, or none and why."""

    asked: Asked
    answers: list[str]
    error: str = ""


def answer_all(predictor: Predictor, wanted: Sequence[Asked]) -> Iterator[Answered]:
    """One after the other, as they come.

    Files are decoded by a process that is killed when it hangs; a file or prompt that cannot be
    used does not stop the others.
    """
    prepare_workers(type(predictor.preprocess).__module__)
    with DecodePool(predictor.preprocess, 1, predictor.decode_timeout, 1) as pool:
        for each in wanted:
            try:
                yield Answered(each, _answers(predictor, pool, each))
            except OSError as error:
                yield Answered(each, [], f"cannot be read ({error.strerror})")
            except EpalmError as error:
                yield Answered(each, [], str(error))


def _answers(predictor: Predictor, pool: DecodePool, asked: Asked) -> list[str]:
    batch = pool.submit([Task.of_media(Media(asked.name, asked.media))])
    error = batch.outcomes[0].result().error
    if error is not None:
        raise EpalmError(f"cannot be decoded ({': '.join(error)})")
    features = predictor.encode_inputs(batch.inputs.clone())  # its memory is used again
    return [
        answer
        for prompts in chunks(asked.prompts, predictor.decode.batch_size)
        for answer in predictor.ask(features, prompts, [0] * len(prompts))
    ]
