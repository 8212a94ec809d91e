"""NoCaps: captions of Open Images with objects that COCO does not have; for evaluation only.

`data.path` is a folder with `nocaps_val_4500_captions.json`; the official test has no public
captions. An example's type is the domain: in-domain, near-domain or out-domain.

`data.media_name` may name {file} (as in the annotations) and {image} (Open Images' id).
"""

from collections import defaultdict

from epalm.config import DataConfig
from epalm.data.annotations import files_by_split, read_object
from epalm.data.collect import Collector
from epalm.data.example import Counts, Dataset

SETTINGS = {"media_root", "files", "media_name"}
FILES = {"val": "nocaps_val_4500_captions.json"}
PUBLISHED = {"nocaps_val_4500_captions.json": Counts(4500, 4500)}


def load(config: DataConfig) -> Dataset:
    """Read images with their ten captions; EpalmError naming file, record and field."""
    collector = Collector(config, "nocaps", "{file}")
    for split, path in files_by_split(config, FILES).items():
        dataset = read_object(path)
        captions: dict[str, list[str]] = defaultdict(list)
        for note in dataset.records("annotations"):
            captions[note.identifier("image_id")].append(note.text("caption", empty=True))
        for record in dataset.records("images"):
            identifier = record.identifier("id")
            names = {"file": record.text("file_name"), "image": record.text("open_images_id")}
            collector.add(
                record, identifier, names, "", captions[identifier], split, record.text("domain")
            )
    return collector.dataset()


def published(config: DataConfig) -> dict[str, Counts]:
    """Images of each split (nocaps.org)."""
    return {s: PUBLISHED[f] for s, f in (config.files or FILES).items() if f in PUBLISHED}
