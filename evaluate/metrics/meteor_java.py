"""METEOR, whose only official implementation is a Java program."""

import subprocess
import tempfile
from collections.abc import Sequence
from subprocess import PIPE

import numpy as np

from epalm.data.example import Example
from epalm.errors import EpalmError
from epalm.evaluate.metrics.captions import Texts, tokenized
from epalm.evaluate.metrics.java import METEOR_DATA, METEOR_JAR, PTB_JAR, require
from epalm.evaluate.metrics.scored import Floats, Metric, Scores, Setting


def meteor(setting: Setting) -> Metric:
    """METEOR 1.5 for English: a corpus value from matches summed over examples.

    The program aligns the words; the score is a function of its counts, and so can be resampled.

    Raises:
        EpalmError: Java or a file is missing.
    """
    require(METEOR_JAR, METEOR_DATA, *([PTB_JAR] if setting.official else []))

    def metric(predictions: Sequence[str], examples: Sequence[Example]) -> Scores:
        statistics = _alignments(*tokenized(predictions, examples, setting))
        # one chunk that is the whole of both texts is no fragment, in sums too
        whole = (statistics[:, 20] == 1) & (statistics[:, 21:] == statistics[:, :2]).all(1)
        statistics[whole, 20] = 0
        return Scores(_meteor(statistics), statistics, _meteor)

    return metric


def _alignments(hypotheses: Texts, references: tuple[Texts, ...]) -> Floats:
    """(N, 23): the counts that METEOR makes of each hypothesis and its best reference.

    Lengths of the two and their function words (4), matching content and function words in either
    for each of the matchers exact, stem, synonym and paraphrase (4 * 4), chunks, matched words (2).
    """
    jar = require(METEOR_JAR, METEOR_DATA) / METEOR_JAR
    command = ["java", "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", str(jar)]
    command += ["-", "-", "-stdio", "-l", "en", "-norm"]
    counts = np.zeros((len(hypotheses), 23))
    with tempfile.TemporaryFile("w+", encoding="utf-8") as complaints:
        try:
            with subprocess.Popen(
                command, stdin=PIPE, stdout=PIPE, stderr=complaints, encoding="utf-8"
            ) as program:
                assert program.stdin is not None and program.stdout is not None
                for row, texts in enumerate(zip(references, hypotheses, strict=True)):
                    fields = [text.replace("|||", "") for text in (*texts[0], texts[1])]
                    program.stdin.write(" ||| ".join(["SCORE", *fields]) + "\n")
                    program.stdin.flush()
                    counts[row] = [float(n) for n in program.stdout.readline().split()]
        except (BrokenPipeError, ValueError):  # gone, or it answered something else
            complaints.seek(0)
            raise EpalmError(f"{jar}: failed: {complaints.read().strip()}") from None
    return counts


def _meteor(sums: Floats) -> Floats:
    """METEOR 1.5 of (…, 23) counts (Denkowski, Lavie 2014), with its parameters for English."""
    alpha, beta, gamma, delta = 0.85, 0.2, 0.6, 0.75
    weights = np.array([1.0, 0.6, 0.8, 0.6])
    lengths, function_words = sums[..., :2], sums[..., 2:4]
    matches = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 2, 2)  # matcher, kind of word, side
    chunks, matched = sums[..., 20], sums[..., 21:]
    content_weight = np.array([delta, 1 - delta])
    total = delta * (lengths - function_words) + (1 - delta) * function_words
    with np.errstate(invalid="ignore", divide="ignore"):  # nothing matched, or nothing said
        weighed = np.einsum("...mks,m,k->...s", matches, weights, content_weight) / total
        precision, recall = weighed[..., 0], weighed[..., 1]
        mean = precision * recall / (alpha * precision + (1 - alpha) * recall)
        penalty = gamma * (chunks / matched.mean(-1)) ** beta
    return np.nan_to_num(mean * (1 - penalty), nan=0.0)
