"""SPICE and SPIDEr, of which the only official implementation is a Java program."""

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from epalm.data.example import Example
from epalm.errors import EpalmError
from epalm.evaluate.metrics.captions import Texts, cider_values, tokenized
from epalm.evaluate.metrics.java import PTB_JAR, require
from epalm.evaluate.metrics.scored import Floats, Metric, Scores, Setting, mean_scores

SPICE_JAR = "spice/spice-1.0.jar"
LIBRARIES = "spice/lib"
MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
"""What the package does not bring, to be put among its libraries."""
LAST_WITH_JAVASCRIPT = 14  # of Java; the program writes its results by its JavaScript engine
ENGINES = ("*rhino*.jar", "*nashorn*.jar")
HEAP = "-Xmx8G"  # as the official script has it


def spice(setting: Setting) -> Metric:
    """SPICE: F of scene graph tuples, mean over examples (Anderson et al., 2016).

    Raises:
        EpalmError: Java or a file is missing.
    """
    _require(setting)

    def metric(predictions: Sequence[str], examples: Sequence[Example]) -> Scores:
        return mean_scores(spice_values(*tokenized(predictions, examples, setting)))

    return metric


def spider(setting: Setting) -> Metric:
    """SPIDEr: the mean of CIDEr-D and SPICE, per example and so over all (Liu et al., 2017).

    Raises:
        EpalmError: Java or a file is missing.
    """
    _require(setting)

    def metric(predictions: Sequence[str], examples: Sequence[Example]) -> Scores:
        texts = tokenized(predictions, examples, setting)
        return mean_scores((cider_values(*texts) + spice_values(*texts)) / 2)

    return metric


@lru_cache(maxsize=1)  # spice and spider ask one after the other, and parsing takes minutes
def spice_values(hypotheses: Texts, references: tuple[Texts, ...]) -> Floats:
    """(N,) SPICE of tokenized texts; EpalmError when the program fails."""
    if not hypotheses:
        return np.zeros(0)
    home = require(SPICE_JAR)
    asked = [
        {"image_id": row, "test": hypothesis, "refs": texts}
        for row, (hypothesis, texts) in enumerate(zip(hypotheses, references, strict=True))
    ]
    # by class path and not -jar, so that a JavaScript engine among the libraries is found
    path = os.pathsep.join([str(home / SPICE_JAR), str(home / LIBRARIES / "*")])
    command = ["java", "-Dfile.encoding=UTF-8", HEAP, "-cp", path, "edu.anu.spice.SpiceScorer"]
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "captions.json"), Path(folder, "scores.json")
        given.write_text(json.dumps(asked), encoding="utf-8")
        done = subprocess.run(
            [*command, str(given), "-out", str(made), "-subset", "-silent"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
        if done.returncode or not made.is_file() or not made.stat().st_size:
            raise EpalmError(f"{home / SPICE_JAR}: failed: {_complaint(done)}")
        found = json.loads(made.read_text(encoding="utf-8"))
    f = {each["image_id"]: each["scores"]["All"]["f"] for each in found}
    return np.array([f[row] for row in range(len(hypotheses))], dtype=np.float64)


def java_version() -> int:
    """8 of `1.8.0_402`, 17 of `17.0.15`; 0 where the program does not say."""
    said = subprocess.run(["java", "-version"], capture_output=True, encoding="utf-8").stderr
    found = re.search(r'version "(?:1\.)?(\d+)', said)
    return int(found[1]) if found else 0


def brings_javascript() -> bool:
    """Whether Java has the engine: up to a version, and from 9 on unless it was left out."""
    version = java_version()
    if version < 9 or version > LAST_WITH_JAVASCRIPT:
        return version <= LAST_WITH_JAVASCRIPT
    listed = subprocess.run(["java", "--list-modules"], capture_output=True, encoding="utf-8")
    return "jdk.scripting.nashorn" in listed.stdout


def _require(setting: Setting) -> None:
    """EpalmError unless all is there that SPICE needs."""
    home = require(SPICE_JAR, *([PTB_JAR] if setting.official else []))
    libraries = home / LIBRARIES
    missing = [name for name in MODELS if not (libraries / name).is_file()]
    if missing:
        raise EpalmError(
            f"evaluate.metrics: spice and spider need {' and '.join(missing)} in {libraries}; both "
            "are in Stanford's stanford-corenlp-full-2015-12-09.zip (`python -m "
            "pycocoevalcap.spice.get_stanford_models` fetches them); or leave out spice and spider"
        )
    if not brings_javascript() and not any(
        engine for pattern in ENGINES for engine in libraries.glob(pattern)
    ):
        raise EpalmError(
            "evaluate.metrics: SPICE writes its results by Java's JavaScript engine, which this "
            f"Java {java_version()} does not have: use a whole Java of 8 to "
            f"{LAST_WITH_JAVASCRIPT}, or put an engine such as rhino.jar into {libraries}; or "
            "leave out spice and spider"
        )


def _complaint(done: "subprocess.CompletedProcess[str]") -> str:
    """The line that tells most of what a Java program said: the first cause, where it names one."""
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    causes = [line.removeprefix("Caused by: ") for line in lines if line.startswith("Caused by: ")]
    telling = (line for line in lines if "Exception" in line or "Error:" in line[:60])
    named = [line for line in telling if not line.endswith(":")]
    return (causes[-1:] or named or lines[-1:] or [f"exit code {done.returncode}"])[0]
