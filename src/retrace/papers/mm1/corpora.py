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
import json
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from retrace.core.config import Frozen, data_root
from retrace.core.tasks import open_stream, require_hub

BUILDERS = {".tar": "webdataset", ".parquet": "parquet", ".jsonl": "json"}
HEAD = 1 << 16  # bytes of a file that its fingerprint reads
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Shard:
    """A part of a corpus: its rows in their order, from a row on."""

    name: str
    rows: Callable[[int], Iterator[Row]]


class EndsEarly(Exception):
    """A shard is damaged behind the rows that it has given."""


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
                given = list(_json_lines(listed, 0))
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
        files = sorted(Path(file) for file in glob.glob(str(root / self.pattern), recursive=True))
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
    """Raise ValueError for a field that the row lacks."""
    for field in config.fields:
        if field not in row:
            has = ", ".join(sorted(key for key in row if not key.startswith("__")))
            raise ValueError(f"{name}: no field {field!r} in a row of a {config.document}; its fields are: {has}")


def fingerprint(config: ImageFolder | LocalShards | HubDataset) -> str:
    """Twelve hex digits over the names, sizes and beginnings of the local files: part of a run's identity."""
    digest = hashlib.sha256()
    for file in config.files():
        with open(file, "rb") as opened:
            digest.update(f"{file.parent.name}/{file.name}/{file.stat().st_size}/".encode() + opened.read(HEAD))
    return digest.hexdigest()[:12]


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
    stream = datasets.load_dataset(BUILDERS[file.suffix], data_files=[str(file)], split="train", streaming=True)
    return _undecoded(stream)


def _undecoded(stream: Any) -> Any:
    return stream if stream.features is None else stream.decode(False)


def _file_rows(file: Path, start: int) -> Iterator[Row]:
    """Rows of one file. Raises EndsEarly where it is damaged behind them."""
    if file.suffix == ".jsonl":
        yield from _json_lines(file, start)
        return
    import datasets

    try:
        yield from _open(file).skip(start)
    except ValueError as error:
        if "WebDataset format" in str(error):  # which `datasets` says of its first five samples
            raise ValueError(
                f"{file}: its first samples do not all have the same files: each needs one of every kind, such as "
                "NAME.jpg and NAME.txt"
            ) from error
        raise EndsEarly(_reason(error)) from error
    except (tarfile.TarError, EOFError, OSError, zlib.error, datasets.exceptions.DatasetsError) as error:
        raise EndsEarly(_reason(error)) from error


def _json_lines(file: Path, start: int) -> Iterator[Row]:
    with open(file, encoding="utf-8") as lines:
        found = 0
        for number, line in enumerate(lines, start=1):
            found += bool(line.strip())
            if found <= start or not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                if line.endswith("\n"):
                    raise ValueError(f"{file}: line {number} is not JSON: {error}") from None
                raise EndsEarly(f"line {number} is torn") from None
            if not isinstance(row, dict):
                raise ValueError(f"{file}: line {number} is no object with fields: {line[:40].strip()}")
            yield {**row, "__folder__": str(file.parent)}


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
