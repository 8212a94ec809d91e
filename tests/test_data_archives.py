"""Media in zip and tar archives and in WebDataset shards, found and read like files."""

import hashlib
import io
import json
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import Result

from epalm.config import DataConfig, Recipe, load_recipe
from epalm.data import archive_index, archives, load_dataset, read
from epalm.data.archives import OPEN_ARCHIVES
from epalm.data.media import Media, MediaRoot, expand
from epalm.errors import EpalmError
from epalm.extract.lookup import open_features
from epalm.extract.loop import extract

CONTENT = {"a/1.jpg": b"one" * 1000, "a/2.jpg": b"two", "b/3.jpg": bytes(range(256)) * 50}


def write_zip(path: Path, content: dict[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, content: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_folder(path: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def links(path: Path, kind: bytes, name: str, target: str) -> Path:
    """A tar with a file and a link."""
    write_tar(path, {"a/1.jpg": b"one"})
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        archive.addfile(info)
    return path


def parts(content: dict[str, bytes], letter: str) -> dict[str, bytes]:
    return {name: data for name, data in content.items() if name.startswith(letter)}


@pytest.fixture
def roots(tmp_path: Path) -> dict[str, str]:
    """The same media behind each kind of root."""
    inside = {f"deep/er/{name}": data for name, data in CONTENT.items()}
    write_folder(tmp_path / "folder", CONTENT)
    write_zip(tmp_path / "packed.zip", CONTENT)
    write_zip(tmp_path / "stored.ZIP", CONTENT, zipfile.ZIP_STORED)
    write_tar(tmp_path / "plain.tar", {f"./{name}": data for name, data in CONTENT.items()})
    write_zip(tmp_path / "inside.zip", inside | {"deep/else.jpg": b""})
    write_tar(tmp_path / "inside.tar", inside)
    for letter in "ab":
        write_zip(tmp_path / f"letter-{letter}.zip", parts(CONTENT, letter))
        write_tar(tmp_path / f"shard-{'ab'.index(letter) + 8:03}.tar", parts(CONTENT, letter))
    names = {
        "folder": "folder",
        "deflated zip": "packed.zip",
        "stored zip": "stored.ZIP",
        "tar": "plain.tar",
        "folder in a zip": "inside.zip/deep/er",
        "folder in a tar": "inside.tar/deep/er",
        "list": "letter-{a,b}.zip",
        "zip and tar": "{letter-a.zip,shard-009.tar}",
        "numbered": "shard-{008..009}.tar",
        "glob": "shard-*.tar",
    }
    return {kind: str(tmp_path / name) for kind, name in names.items()}


def test_every_kind_of_root_gives_the_same_bytes(roots: dict[str, str]) -> None:
    for kind, text in roots.items():
        root = MediaRoot(text)
        for name, data in CONTENT.items():
            media = root.find(name)
            assert (media.id, media.read()) == (name, data), kind
            assert media.sha256() == hashlib.sha256(data).hexdigest(), kind
            size, modified = media.version()
            assert (size, modified) == (len(data), media.path.stat().st_mtime_ns), kind
            assert media.exists(), kind
        gone = root.find("a/4.jpg")
        assert not gone.exists(), kind
        with pytest.raises(FileNotFoundError):
            gone.version()
        assert not root.find("a").exists(), kind


def test_braces_and_numbers(tmp_path: Path) -> None:
    words = [str(path) for path, _ in expand("x/{a,b}/{08..11}-{0..1}.tar")]
    assert words[:4] == ["x/a/08-0.tar", "x/a/08-1.tar", "x/a/09-0.tar", "x/a/09-1.tar"]
    assert words[-1] == "x/b/11-1.tar" and len(words) == 16
    (tmp_path / "{a}[b]").mkdir()
    assert expand(str(tmp_path / "{a}[b]")) == [(tmp_path / "{a}[b]", "")]
    assert expand(str(tmp_path / "*.zip")) == []
    with pytest.raises(EpalmError, match="names several folders"):
        MediaRoot(str(tmp_path / "{a,b}"))


def test_absent_archives_are_told_and_their_media_missing(roots: dict[str, str]) -> None:
    text = roots["numbered"].replace("009", "010")
    root = MediaRoot(text)
    assert [p.name for p in root.absent] == ["shard-010.tar"]
    assert root.find("a/1.jpg").exists() and root.find("b/3.jpg").exists()
    nothing = MediaRoot(text.replace("{008..010}", "999"))
    assert [p.name for p in nothing.absent] == ["shard-999.tar"]
    assert not nothing.find("a/1.jpg").exists()


def test_links_inside_a_tar_are_followed(tmp_path: Path) -> None:
    for kind, target in ((tarfile.SYMTYPE, "../a/./1.jpg"), (tarfile.LNKTYPE, "a/1.jpg")):
        root = MediaRoot(str(links(tmp_path / "x.tar", kind, "b/2.jpg", target)))
        assert root.find("b/2.jpg").read() == b"one"
    root = MediaRoot(str(links(tmp_path / "x.tar", tarfile.SYMTYPE, "b/2.jpg", "b/2.jpg")))
    assert not root.find("b/2.jpg").exists()


def zip_with_link(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("a.jpg")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: write_tar(p, {"../a.jpg": b""}), r"\.\./a\.jpg, which leaves the archive"),
        (lambda p: write_tar(p, {"/a.jpg": b""}), r"/a\.jpg, which leaves the archive"),
        (lambda p: write_tar(p, {"a/../../b.jpg": b""}), "which leaves the archive"),
        (
            lambda p: links(p, tarfile.SYMTYPE, "b.jpg", "/etc/passwd"),
            "b.jpg links to /etc/passwd, which leaves the archive",
        ),
        (
            lambda p: links(p, tarfile.SYMTYPE, "a/b.jpg", "../../b.jpg"),
            r"a/b.jpg links to \.\./\.\./b.jpg, which leaves the archive",
        ),
        (lambda p: links(p, tarfile.LNKTYPE, "b.jpg", "../x"), "leaves the archive"),
        (lambda p: write_zip(p.with_suffix(".zip"), {"../a.jpg": b""}), "leaves the archive"),
        (lambda p: zip_with_link(p.with_suffix(".zip")), "a.jpg is a link"),
        (lambda p: write_tar(p.with_suffix(".tar.gz"), CONTENT, "w:gz"), "unpack it"),
        (lambda p: write_tar(p, CONTENT, "w:gz"), "not a whole .tar archive"),
        (lambda p: write_folder(p.parent, {"x.zip": b"PK\3\4"}) / "x.zip", "not a whole .zip"),
    ],
)
def test_archives_that_are_refused(
    make: Callable[[Path], Path], words: str, tmp_path: Path
) -> None:
    path = make(tmp_path / "x.tar")
    with pytest.raises(EpalmError, match=words) as error:
        MediaRoot(str(path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize("kind", ["packed.zip", "plain.tar"])
def test_archives_that_are_cut_off(kind: str, roots: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / kind
    whole = path.read_bytes()
    size = whole.index(CONTENT["b/3.jpg"][:200]) + 300 if kind.endswith("tar") else len(whole) - 30
    root = MediaRoot(str(path))
    path.write_bytes(whole[:size])
    with pytest.raises(EpalmError, match="not a whole"):
        MediaRoot(str(path))
    with pytest.raises((OSError, zipfile.BadZipFile)):
        root.find("b/3.jpg").read()


def test_a_damaged_member_cannot_be_read(roots: dict[str, str]) -> None:
    path = Path(roots["stored zip"])
    content = path.read_bytes().replace(b"two", b"2wo")
    path.write_bytes(content)
    with pytest.raises(OSError, match="Bad CRC"):
        MediaRoot(str(path)).find("a/2.jpg").read()


@pytest.mark.parametrize("how", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_packing_cannot_be_read(how: int, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "packed.zip", {"a.jpg": bytes(range(256)) * 9}, how)
    content = bytearray(path.read_bytes())
    content[45:75] = b"\xff" * 30
    path.write_bytes(content)
    with pytest.raises(OSError):
        MediaRoot(str(path)).find("a.jpg").read()


def test_a_name_in_two_archives_is_refused(tmp_path: Path) -> None:
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", {"1.jpg": name.encode()})
    with pytest.raises(EpalmError, match=r"1.jpg stands in .*a.tar and in .*b.tar"):
        MediaRoot(str(tmp_path / "{a,b}.tar"))
    root = MediaRoot(str(tmp_path / "*.tar"), under=tmp_path)
    assert [root.find(f"{name}/1.jpg").read() for name in "ab"] == [b"a", b"b"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and an index for each tar."""
    monkeypatch.setenv("EPALM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(archive_index, "SMALLEST", 0)
    return tmp_path / "cache"


def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tars whose headers are read from now on."""
    seen: list[str] = []
    real = archives._list_tar

    def counted(archive: Path) -> dict[str, archive_index.TarMember]:
        seen.append(archive.name)
        return real(archive)

    monkeypatch.setattr(archives, "_list_tar", counted)
    return seen


def test_headers_of_a_tar_are_read_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"a/1.jpg": b"one", "a/é\n.txt": b"two", "b\udcff.jpg": b"three", "empty": b""}
    for shard, content in (("0", names), ("1", {"c.jpg": b"four"})):
        write_tar(tmp_path / f"{shard}.tar", content)
    links(tmp_path / "2.tar", tarfile.SYMTYPE, "d.jpg", "a/1.jpg")
    text = str(tmp_path / "*.tar")
    seen = scans(monkeypatch)
    first = MediaRoot(text, under=tmp_path)
    assert seen == ["0.tar", "1.tar", "2.tar"]
    again = MediaRoot(text, under=tmp_path)
    assert len(seen) == 3 and again.members == first.members
    assert {m.id: m.read() for m in again.members.values()} == {
        **{f"0/{name}": content for name, content in names.items()},
        "1/c.jpg": b"four", "2/a/1.jpg": b"one", "2/d.jpg": b"one",
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)  # the same archive by another path
    assert MediaRoot("1.tar").find("c.jpg").read() == b"four" and len(seen) == 3
    assert sorted(p.suffix for p in (cache / "archives").iterdir()) == [".json"] * 3


def test_an_index_that_does_not_fit_is_made_anew(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tar(tmp_path / "x.tar", {"1.jpg": b"one"})
    root, modified = str(path), path.stat().st_mtime_ns
    MediaRoot(root)
    seen = scans(monkeypatch)
    write_tar(path, {"1.jpg": b"two", "2.jpg": bytes(20_000)})  # another size
    os.utime(path, ns=(0, modified))
    assert MediaRoot(root).find("1.jpg").read() == b"two" and len(seen) == 1
    size = path.stat().st_size
    write_tar(path, {"2.jpg": bytes(20_000), "1.jpg": b"two"})  # of the same size, at another time
    os.utime(path, ns=(0, 7))
    assert path.stat().st_size == size
    assert MediaRoot(root).find("1.jpg").read() == b"two" and len(seen) == 2
    index = archive_index.index_path(path)
    whole = index.read_text()
    for broken in (
        "",
        "[]",
        whole[:-20],
        whole.replace('"sizes":[', '"sizes":[1,'),
        whole.replace('"format":1', '"format":0'),
        whole.replace("x.tar", "y.tar"),
    ):
        index.write_text(broken)
        assert MediaRoot(root).find("1.jpg").read() == b"two"
        assert index.read_text() == whole
    assert len(seen) == 8


def test_archives_need_no_index(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where none can be written, of what is refused, and of what is small."""
    seen = scans(monkeypatch)
    with pytest.raises(EpalmError, match="leaves the archive"):
        MediaRoot(str(write_tar(tmp_path / "out.tar", {"../a.jpg": b""})))
    assert not (cache / "archives").exists()
    path = write_tar(tmp_path / "x.tar", {"1.jpg": b"one"})
    cache.write_text("no folder")
    for _ in range(2):
        assert MediaRoot(str(path)).find("1.jpg").read() == b"one"
    cache.unlink()
    monkeypatch.setattr(archive_index, "SMALLEST", path.stat().st_size + 1)
    MediaRoot(str(path))
    assert len(seen) == 4 and not cache.exists()


def test_archives_stay_open_but_not_too_many(tmp_path: Path) -> None:
    """Threads that push each other's archives out still read what they asked for."""
    contents = {f"{number}.jpg": b"%d" % number * 20 for number in range(3 * OPEN_ARCHIVES)}
    for number, (name, content) in enumerate(contents.items()):
        write = write_zip if number % 2 else write_tar
        write(tmp_path / f"{number}.{'zip' if number % 2 else 'tar'}", {name: content})
    root = MediaRoot(str(tmp_path / "*"))
    names = list(contents) * 5
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda name: root.find(name).read(), names))
    assert found == [contents[name] for name in names]
    # one cache for each kind
    assert len(os.listdir("/proc/self/fd")) - before <= 2 * OPEN_ARCHIVES


# --- extraction ----------------------------------------------------------------------------------


def in_archive(toy: Callable[..., Path], folder: Path) -> tuple[Recipe, Path]:
    """The toy dataset with its images in a zip; the folder is gone."""
    path = toy()
    images = {f"images/{p.name}": p.read_bytes() for p in (folder / "images").iterdir()}
    archive = write_zip(folder / "toy.zip", images)
    for image in (folder / "images").iterdir():
        image.unlink()
    return load_recipe(path, (f"data.media_root={archive}",)), archive


def test_extraction_from_an_archive_and_its_resumption(
    toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, archive = in_archive(toy, tmp_path)
    assert extract(recipe, load_dataset(recipe)).encoded == 12
    with monkeypatch.context() as patched:  # unchanged: nothing is read again
        patched.setattr(Media, "read", lambda self: pytest.fail("read again"))
        report = extract(recipe, load_dataset(recipe))
        assert (report.encoded, report.found, report.removed) == (0, 12, [])
    # a part of the dataset: what is left out has not gone
    part = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"limits": recipe.data.limits.model_copy(
            update={"train": 2})})}
    )  # fmt: skip
    assert extract(part, load_dataset(part)).removed == []
    os.utime(archive)  # as after copying: hashed again, nothing encoded
    report = extract(recipe, load_dataset(recipe))
    assert (report.encoded, report.found) == (0, 12)
    # unpacked, the features are the same; so they are in a tar
    with zipfile.ZipFile(archive) as file:
        content = {name: file.read(name) for name in file.namelist()}
    archive.unlink()
    write_folder(tmp_path, content)
    folder = load_recipe(toy_path(tmp_path))
    assert extract(folder, load_dataset(folder)).encoded == 0
    content["images/3.png"] = content["images/4.png"] + b"\0"  # another file, the same picture
    tar = write_tar(tmp_path / "toy.tar", content)
    tarred = load_recipe(toy_path(tmp_path), (f"data.media_root={tar}",))
    with pytest.raises(EpalmError, match="already stands for the media in"):
        extract(tarred, load_dataset(tarred))
    tarred = load_recipe(toy_path(tmp_path), (f"data.media_root={tar}", "data.name=tarred"))
    assert extract(tarred, load_dataset(tarred)).encoded == 1
    tar.unlink()
    table, dataset = open_features(tarred, load_dataset(tarred))
    assert len(dataset.media) == 12 and table.has("images/3.png", 0)


def test_packed_media_keep_their_name(toy: Callable[..., Path], tmp_path: Path) -> None:
    """The folder stays: of jsonl it holds the annotations too."""
    folder = load_recipe(toy())
    extract(folder, load_dataset(folder))
    images = {f"images/{p.name}": p.read_bytes() for p in (tmp_path / "images").iterdir()}
    archive = write_zip(tmp_path / "toy.zip", images)
    zipped = load_recipe(toy_path(tmp_path), (f"data.media_root={archive}",))
    for recipe in (zipped, folder, zipped):  # and back
        report = extract(recipe, load_dataset(recipe))
        assert (report.encoded, report.found, report.removed) == (0, 12, [])
        table, dataset = open_features(recipe, load_dataset(recipe))
        assert all(table.has(media, 0) for media in dataset.media)


def toy_path(folder: Path) -> Path:
    return folder / "toy.yaml"


def test_missing_members_are_told(toy: Callable[..., Path], tmp_path: Path) -> None:
    recipe, archive = in_archive(toy, tmp_path)
    write_zip(archive, {"images/1.png": b"no image"})
    with pytest.raises(EpalmError, match="No such file") as error:
        extract(recipe, load_dataset(recipe))
    assert "12 media" in str(error.value)


# --- WebDataset shards of CC3M -------------------------------------------------------------------


def shards(folder: Path, samples: dict[str, bytes]) -> DataConfig:
    write_tar(folder / "train" / "00000.tar", samples)
    more = {"000010000.jpg": b"three", "000010000.json": b'{"caption": "a cup", "url": "u"}'}
    write_tar(folder / "train" / "00001.tar", more)
    write_tar(folder / "val" / "00000.tar", {"000000000.jpg": b"four", "000000000.txt": b"a man "})
    files = {"train": "train/{00000..00001}.tar", "val": "val/*.tar"}
    return DataConfig(kind="cc3m", path=str(folder), files=files)


SAMPLES = {
    "000000000.jpg": b"one",
    "000000000.txt": "é caption".encode(),
    "000000000.json": b'{"caption": "another"}',
    "000000001.txt": b"the image is missing",
    "000000002.webp": b"two",
    "000000002.cls": b"7",
    "000000002.txt": b"a cat",
}


def test_shards(tmp_path: Path) -> None:
    dataset = read(shards(tmp_path, SAMPLES))
    found = {e.id: (e.split, e.references, dataset.media[e.media].exists())
             for e in dataset.examples}  # fmt: skip
    assert found == {
        "train/00000/000000000": ("train", ("é caption",), True),
        "train/00000/000000001": ("train", ("the image is missing",), False),
        "train/00000/000000002": ("train", ("a cat",), True),
        "train/00001/000010000": ("train", ("a cup",), True),
        "val/00000/000000000": ("val", ("a man",), True),
    }
    assert dataset.media["train/00000/000000002.webp"].read() == b"two"


def test_captions_of_shards_are_read_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = shards(tmp_path / "cc3m", SAMPLES)
    seen: list[str] = []
    real = Media.read

    def counted(media: Media) -> bytes:
        seen.append(media.id)
        return real(media)

    monkeypatch.setattr(Media, "read", counted)
    first = read(config)
    assert len(seen) == len(first.examples) == 5
    assert read(config) == first and len(seen) == 5
    shard = tmp_path / "cc3m" / "train" / "00000.tar"
    kept = archive_index.index_path(shard, "captions")
    for broken in ('["a cat"]', '["a cat", "a dog", 3]', "3"):  # of other samples, or no texts
        whole = json.loads(kept.read_text())
        kept.write_text(json.dumps(whole | {"captions": json.loads(broken)}))
        assert read(config) == first
    assert len(seen) == 5 + 3 * 3
    write_tar(shard, SAMPLES | {"000000002.txt": b"a dog"})
    os.utime(shard, ns=(0, 7))
    assert ("a dog",) in {e.references for e in read(config).examples}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"000000002.txt": b"\xff"}, "00000.tar, sample 000000002: its caption cannot be read"),
        ({"000000002.txt": b" "}, "sample 000000002: field 'caption' is ' '"),
        ({"000000003.jpg": b"x"}, "sample 000000003: field 'caption' is missing"),
        ({"000000003.json": b"{"}, "sample 000000003: its caption cannot be read"),
        ({"000000003.json": b"[]"}, "sample 000000003: its .json member must hold an object"),
        ({"000000003.json": b'{"caption": NaN}'}, "sample 000000003: field 'caption' is nan"),
    ],
)
def test_broken_samples(change: dict[str, bytes], words: str, tmp_path: Path) -> None:
    with pytest.raises(EpalmError, match=words):
        read(shards(tmp_path, SAMPLES | change))


def test_absent_shards(tmp_path: Path) -> None:
    config = shards(tmp_path, SAMPLES)
    (tmp_path / "train" / "00001.tar").unlink()
    with pytest.raises(EpalmError, match="00001.tar: no such shards"):
        read(config)
    with pytest.raises(EpalmError, match="no such shards"):
        read(config.model_copy(update={"files": {"train": "other/*.tar"}}))
    with pytest.raises(EpalmError, match="no meaning for shards"):
        read(config.model_copy(update={"media_root": "x"}))


def test_the_command_checks_an_archive(
    toy: Callable[..., Path], tmp_path: Path, cli: Callable[..., Result]
) -> None:
    _, archive = in_archive(toy, tmp_path)
    sets = ("--set", f"data.media_root={archive}")
    done = cli("data", "check", toy_path(tmp_path), *sets)
    assert done.exit_code == 0, done.output
    archive.unlink()
    done = cli("data", "check", toy_path(tmp_path), *sets)
    assert done.exit_code == 1
    assert f"archives that are not here: {archive}" in done.output
    assert json.dumps(12) in done.output
