"""The Java programs of the official caption scripts, as the package pycocoevalcap carries them."""

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from epalm.errors import EpalmError

PTB_JAR = "tokenizer/stanford-corenlp-3.4.1.jar"
METEOR_JAR = "meteor/meteor-1.5.jar"
METEOR_DATA = "meteor/data/paraphrase-en.gz"


def require(*files: str) -> Path:
    """The folder of pycocoevalcap, which holds these files, on a machine that has Java.

    Raises:
        EpalmError: Java or one of the files is missing.
    """
    if shutil.which("java") is None:
        raise EpalmError(
            "evaluate.metrics: no program `java` on the PATH; install a Java runtime (8 or newer), "
            "or leave out meteor, spice, spider and evaluate.official"
        )
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise EpalmError("evaluate.metrics: pip install pycocoevalcap, whose files are needed")
    folder = Path(spec.submodule_search_locations[0])
    missing = [str(folder / name) for name in files if not (folder / name).is_file()]
    if missing:
        raise EpalmError(f"evaluate.metrics: missing {', '.join(missing)}")
    return folder


def stanford_lines(texts: Sequence[str]) -> list[str]:
    """Each text's tokens as Stanford's PTBTokenizer 3.4.1 prints them, lower-cased, one line each.

    The call is the official caption script's, with white space of every kind as spaces, so that a
    text cannot break into two lines.

    Raises:
        EpalmError: Java or the jar is missing, or the program failed.
    """
    if not texts:
        return []
    jar = require(PTB_JAR) / PTB_JAR
    command = [
        *(
            "java",
            "-Dfile.encoding=UTF-8",
            "-cp",
            str(jar),
            "edu.stanford.nlp.process.PTBTokenizer",
        ),
        *("-preserveLines", "-lowerCase"),
    ]
    done = subprocess.run(
        command,
        input="".join(" ".join(text.split()) + "\n" for text in texts),
        capture_output=True,
        encoding="utf-8",
    )
    lines = done.stdout.split("\n")[:-1]
    if done.returncode or len(lines) != len(texts):
        raise EpalmError(f"{jar}: made {len(lines)} lines of {len(texts)} texts: {done.stderr}")
    return lines
