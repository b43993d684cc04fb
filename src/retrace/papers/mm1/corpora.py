"""Real data: a folder of photos, shards (tar, parquet, JSON lines) below RETRACE_DATA, datasets of the hub. No torch.

A row is a dict of fields; `document` says what it becomes:
- "caption": an image and the text of it;
- "synthetic": the same, with a text that a model wrote;
- "interleaved": two lists of one length, of images and of texts, each place with one of them and null in the other;
- "text": the text alone;
- "instruction": an image, a question, and its answer in the text field, which alone is learned.
"""

from __future__ import annotations

import glob
import hashlib
import os
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from retrace.core.config import Frozen, data_root
from retrace.core.tasks import open_stream, require_hub
from retrace.papers.mm1.lines import EndsEarly, Row, json_lines

BUILDERS = {".tar": "webdataset", ".parquet": "parquet", ".jsonl": "json"}
TEXTS = (".txt", ".json", ".jsonl", ".csv")  # read whole by a fingerprint
ENDS = 1 << 16  # bytes of any other file that it reads at either end


@dataclass(frozen=True)
class Shard:
    """A part of a corpus: its rows in their order, from a row on."""

    name: str
    rows: Callable[[int], Iterator[Row]]


class _Corpus(Frozen):
    """What every corpus says of its rows."""

    document: Literal["caption", "synthetic", "interleaved", "text", "instruction"]
    image_field: str = "image"  # of "interleaved": a list
    text_field: str = "text"
    question_field: str = "question"
    max_bad_share: float = Field(0.01, ge=0, lt=1)  # of images that can't be read; more are refused

    @property
    def fields(self) -> list[str]:
        """Fields that every row must have."""
        image = [] if self.document == "text" else [self.image_field]
        return [*image, *([self.question_field] if self.document == "instruction" else []), self.text_field]


class ImageFolder(_Corpus):
    """Photos with captions: PHOTO.txt beside each, or one captions.jsonl with lines {"image": ..., "text": ...}.

    Or one metadata.jsonl with lines {"file_name": ..., "text": ...}, as `datasets` names them.
    """

    kind: Literal["folder"]
    path: str = Field(min_length=1)  # its folders are read too

    def shards(self) -> list[Shard]:
        """One for each photo that has a caption, so that every epoch has an order of its own."""
        return [Shard(f"{self.path}: photo {i}", partial(_given, [row])) for i, row in enumerate(self._rows())]

    def files(self) -> list[Path]:
        """All that is not hidden. Raises ValueError where there is no folder."""
        folder = _root(self.path) / self.path
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder: put photos and their captions there")
        found = (file for file in folder.rglob("*") if file.is_file())
        return sorted(f for f in found if not any(part.startswith(".") for part in f.relative_to(folder).parts))

    def notes(self) -> dict[str, int]:
        """Files that have no caption, and are left out."""
        captioned = {row.get(self.image_field) for row in self._rows()}
        return {"uncaptioned": sum(str(file) not in captioned for file in self._photos())}

    def _photos(self) -> list[Path]:
        """Whatever is no caption: a file that is no image is then counted as one that can't be read."""
        return [file for file in self.files() if file.suffix not in (".txt", ".jsonl")]

    def _rows(self) -> list[Row]:
        folder, key = _root(self.path) / self.path, self.image_field
        for listed, named in ((folder / "captions.jsonl", key), (folder / "metadata.jsonl", "file_name")):
            if not listed.is_file():
                continue
            try:
                given = list(json_lines(listed, 0))
            except EndsEarly as error:
                raise ValueError(f"{listed}: {error}: write it anew") from error
            return [{**row, key: str(folder / str(row[named]))} if named in row else row for row in given]
        photos = self._photos()
        beside = [(photo, photo.with_suffix(".txt")) for photo in photos]
        rows: list[Row] = [
            {self.image_field: str(photo), self.text_field: _caption(text)} for photo, text in beside if text.is_file()
        ]
        if not rows:
            raise ValueError(
                f"{folder}: {len(photos)} photos and no caption: put PHOTO.txt beside each photo, or a "
                'captions.jsonl with lines {"image": "PHOTO.jpg", "text": "..."}'
            )
        return rows


class LocalShards(_Corpus):
    """Files below RETRACE_DATA that a pattern names: webdataset tars, parquet or JSON lines."""

    kind: Literal["shards"]
    pattern: str = Field(min_length=1)  # as in cc3m/*.tar; images that rows name by path lie relative to their file

    def files(self) -> list[Path]:
        """Raises ValueError where there are none, or of several or unknown kinds."""
        root = _root(self.pattern)
        files = sorted(root / file for file in glob.glob(self.pattern, root_dir=root, recursive=True))
        kinds = {file.suffix for file in files}
        if len(kinds) != 1 or not kinds <= BUILDERS.keys():
            found = f"{len(files)} files ({', '.join(sorted(kinds))})" if files else "no file"
            raise ValueError(
                f"{root / self.pattern}: {found}: expected files that all end in one of {', '.join(BUILDERS)}"
            )
        return files

    def shards(self) -> list[Shard]:
        """One for each file."""
        return [Shard(str(file), partial(_file_rows, file)) for file in self.files()]

    def notes(self) -> dict[str, int]:
        return {}


class HubDataset(_Corpus):
    """A dataset of the hub, read as a stream."""

    kind: Literal["hub"]
    dataset: str = Field(min_length=1)
    subset: str | None = None  # the dataset's config name
    split: str = "train"
    revision: str = Field(min_length=1)  # a commit fixes the data; a branch does not

    def shards(self) -> list[Shard]:
        """The dataset's own. Raises ValueError, within seconds, where the hub does not answer."""
        import datasets

        require_hub(self.dataset, self._instead)
        try:
            stream = _undecoded(open_stream(self.dataset, self.subset, split=self.split, revision=self.revision))
            count = stream.num_shards
        except (OSError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"{self.dataset}: {_reason(error)}; {self._instead}") from error
        parts = (stream.shard(num_shards=count, index=index) for index in range(count))
        return [Shard(f"{self.dataset}: shard {i}", partial(self._rows, part)) for i, part in enumerate(parts)]

    def _rows(self, part: Any, start: int) -> Iterator[Row]:
        try:
            yield from part.skip(start)
        except OSError as error:
            raise ValueError(f"{self.dataset}: {_reason(error)}; {self._instead}") from error

    def files(self) -> list[Path]:
        return []

    def notes(self) -> dict[str, int]:
        return {}

    @property
    def _instead(self) -> str:
        return (
            f"where it can be reached, download split {self.split} as parquet files, copy them below RETRACE_DATA, and "
            "name them instead: {kind: shards, pattern: FOLDER/*.parquet}"
        )


CorpusConfig = Annotated[ImageFolder | LocalShards | HubDataset, Field(discriminator="kind")]


def check(config: ImageFolder | LocalShards | HubDataset) -> None:
    """Raise ValueError where the corpus is not there, or its first row lacks a field; reads one row."""
    for shard in config.shards():
        try:
            row = next(shard.rows(0), None)
        except EndsEarly:
            continue
        if row is not None:
            require_fields(config, row, name=shard.name)
            return
    raise ValueError(f"{config.kind} {getattr(config, 'pattern', None) or config.document}: no row that can be read")


def require_fields(config: ImageFolder | LocalShards | HubDataset, row: Row, *, name: str) -> None:
    """Raise ValueError for a field that the row lacks, and for a text that is none, nor a list of texts, nor null."""
    for field in config.fields:
        if field not in row:
            has = ", ".join(sorted(key for key in row if not key.startswith("__")))
            raise ValueError(f"{name}: no field {field!r} in a row of a {config.document}; its fields are: {has}")
    text = row[config.text_field]
    if any(not isinstance(part, str | None) for part in (text if isinstance(text, list) else [text])):
        raise ValueError(
            f"{name}: {config.text_field}={str(text)[:60]}: expected a text or a list of texts: rewrite the file so"
        )


def fingerprint(config: ImageFolder | LocalShards | HubDataset) -> str:
    """Twelve hex digits of the local files: part of a run's identity.

    Of the names, the sizes and what is in them: all of a text, the beginning and the end of any other.
    """
    digest = hashlib.sha256()
    for file in config.files():
        stat = file.stat()
        settled = time.time_ns() - stat.st_mtime_ns > 10**9  # else a file may change again at the same time
        content = (_content if settled else _content.__wrapped__)(file, stat.st_size, stat.st_mtime_ns)
        digest.update(f"{file.parent.name}/{file.name}/{stat.st_size}/".encode() + content)
    return digest.hexdigest()[:12]


@lru_cache(maxsize=1 << 16)  # each run of an ablation asks for the same files
def _content(file: Path, size: int, changed_ns: int) -> bytes:  # noqa: ARG001
    """Digest of what a fingerprint reads of a file of that size and time of change."""
    with open(file, "rb") as opened:
        if file.suffix.lower() in TEXTS or size <= 2 * ENDS:
            return hashlib.file_digest(opened, "sha256").digest()
        head = opened.read(ENDS)
        opened.seek(-ENDS, os.SEEK_END)
        return hashlib.sha256(head + opened.read()).digest()


def _caption(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: no text in UTF-8 ({error.reason}): save it as that") from error


def _given(rows: Sequence[Row], start: int) -> Iterator[Row]:
    yield from rows[start:]


def _root(name: str) -> Path:
    root = data_root()
    if root is None:
        raise ValueError(f"{name}: RETRACE_DATA is not set: set it to the folder that holds it")
    return root


@lru_cache(maxsize=1024)  # opening takes longer than reading a few hundred rows
def _open(file: Path) -> Any:
    """A file as a stream of `datasets`, image files as their bytes; of a tar it reads five rows to learn the fields."""
    import datasets
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    WebDataset.DECODERS.pop("pth", None)  # it would unpickle tensors, if only such; as bytes they harm nobody
    named = [glob.escape(str(file))]
    stream = datasets.load_dataset(BUILDERS[file.suffix], data_files=named, split="train", streaming=True)
    return _undecoded(stream)


def _undecoded(stream: Any) -> Any:
    return stream if stream.features is None else stream.decode(False)


def _file_rows(file: Path, start: int) -> Iterator[Row]:
    """Rows of one file. Raises EndsEarly where it is damaged behind them."""
    if file.suffix == ".jsonl":
        yield from json_lines(file, start)
        return
    import datasets

    try:
        for row in _open(file).skip(start):
            yield {**row, "__folder__": str(file.parent)}
    except ValueError as error:
        if "WebDataset format" in str(error):  # which `datasets` says of its first five samples
            raise ValueError(
                f"{file}: its first samples do not all have the same files: each needs one of every kind, such as "
                "NAME.jpg and NAME.txt"
            ) from error
        raise EndsEarly(_reason(error)) from error
    except (tarfile.TarError, EOFError, OSError, zlib.error, datasets.exceptions.DatasetsError) as error:
        raise EndsEarly(_reason(error)) from error


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
