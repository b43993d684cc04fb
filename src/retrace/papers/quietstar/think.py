"""`retrace think MODEL TEXT`: what each token of a text gains from the thoughts before it, and what those are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from retrace.core.discovery import papers
from retrace.core.files import write_atomic
from retrace.core.lookup import find_run
from retrace.core.store import Store
from retrace.papers.quietstar.gains import Decoding, Export, Inspection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from retrace.papers.quietstar.inspection import Progress
    from retrace.papers.quietstar.model import ThoughtModel

SLUG = "quietstar"


def think(
    model: Annotated[
        str,
        typer.Argument(
            help="A finished train run (its id, the start of one, or a label such as thoughts/thoughts/s0), a folder "
            "with a model that thinks, or the name of one on the hub",
            show_default=False,
        ),
    ],
    text: Annotated[
        str | None, typer.Argument(help="The text; - reads standard input", metavar="TEXT", show_default=False)
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Read the text from this file", show_default=False)] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="Sample so many thoughts at every token (default: the greedy one alone)"),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the samples (default: 0)")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Temperature of the samples (default: that of the training)")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Read a long text so many tokens at a time (default: all at once)")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the page, one file, coloured by gain")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the numbers and the thoughts")] = None,
) -> None:
    """Show what every token of a text gains from the thought before it, and the thought.

    The gain is the log-probability of the token (nats) with the thought minus that without it: +0.69 doubles the
    probability, -0.69 halves it.

    [bold]Examples[/]

    retrace think main/main/s0 "Q: Ada has 5 apples, first gives 2, then doubles. How many now?"

    retrace think quietstar-train-a429 --file story.txt --samples 4 --html story.html
    """
    decoding = _decoding(samples, seed, temperature)
    document = _read(text, file)
    for target in (html, json):
        if target is not None and target.is_dir():
            raise ValueError(f"{target}: is a folder: name a file to write")
    folder, origin = locate(model, store=Store())
    thinker, tokenizer = _load(folder)
    found = _inspect(thinker, tokenizer, document, decoding=decoding, window=window)
    origin = {**origin, "thoughts": str(found.decoding)}
    if thinker.config.prefix:
        origin["each begins with"] = thinker.config.prefix
    if window is not None:
        origin["window"] = f"{window} tokens"
    _tell(found, origin)
    if json is not None:
        write_atomic(json, Export.of(found, origin=origin).model_dump_json(indent=1, by_alias=True) + "\n")
    if html is not None:
        from retrace.papers.quietstar.thoughtpage import Part, page

        write_atomic(html, page([Part("", found)], title=f"What {origin['model']} thinks", origin=origin))


def _decoding(samples: int | None, seed: int | None, temperature: float | None) -> Decoding:
    for name, value in (("--seed", seed), ("--temperature", temperature)):
        if samples is None and value is not None:
            raise ValueError(f"{name} {value}: the greedy thought has none; sample thoughts with --samples N")
    if temperature is not None and not temperature > 0:
        raise ValueError(f"--temperature {temperature}: expected more than 0; the greedy thought is the default")
    return Decoding(num_samples=samples, seed=seed or 0, temperature=temperature)


def _read(text: str | None, file: Path | None) -> str:
    """The text as it stands, from the one place that was named."""
    if (text is None) == (file is None):
        raise ValueError("expected one text: give it as an argument, as - and standard input, or with --file FILE")
    name = "standard input" if file is None else str(file)
    try:
        if file is not None:
            return file.read_bytes().decode()
        if text == "-":
            return sys.stdin.buffer.read().decode()
        assert text is not None
        return text.encode("utf-8", "surrogateescape").decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 text (byte {error.start}): convert it first") from None


def locate(word: str, *, store: Store) -> tuple[Path, dict[str, str]]:
    """The folder of the model that a word names, and what to call it: model, and a run's id, scale and seed.

    Raises ValueError for a word that names nothing.
    """
    path = Path(word)
    if path.is_dir():
        inner = path / "model"  # the folder of a run
        return (inner if (inner / "config.json").is_file() else path), {"model": word}
    found = find_run(word, paper=SLUG, program="train", store=store)
    if found is not None:
        named = {"run": found.id, "scale": found.scale, "seed": str(found.seed)}
        return store.run(found.id).path / "model", {"model": word if word in found.labels else found.label, **named}
    from retrace.papers.quietstar.pretrained import find_folder

    nothing = f"{word}: no finished train run in {store.runs} (see `retrace status`), no folder"
    if word.count("/") != 1 or word.startswith((".", "/", *papers())):
        raise ValueError(f"{nothing}, and not the name of a model on the hub")
    try:
        return find_folder(word), {"model": word}
    except OSError as error:
        raise ValueError(f"{nothing}, and not to be had from the hub: {' '.join(str(error).split())}") from None


def _load(folder: Path) -> tuple[ThoughtModel, PreTrainedTokenizerBase]:
    import torch
    from transformers.utils import logging

    from retrace.papers.quietstar.pretrained import from_pretrained

    logging.disable_progress_bar()
    return from_pretrained(folder, device="cuda" if torch.cuda.is_available() else "cpu")


def _inspect(
    model: ThoughtModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    decoding: Decoding,
    window: int | None,
) -> Inspection:
    from retrace.papers.quietstar.inspection import inspect

    with _progress() as on_progress:
        return inspect(model, tokenizer, text, decoding=decoding, window=window, on_progress=on_progress)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on a terminal, which goes when the work is done; nothing elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = ("thinking", BarColumn(), MofNCompleteColumn(), "tokens", TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _tell(found: Inspection, origin: dict[str, str]) -> None:
    from retrace.papers.quietstar.thoughtview import lines

    console = Console()
    for line in lines(found, origin, rich=console.is_terminal):
        console.print(line, soft_wrap=True)
