"""`retrace moments`: the predicted variance, correlation and gradients of a model at initialisation, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from retrace.core.files import write_atomic
from retrace.papers.deepscalelm.components import Moments
from retrace.papers.deepscalelm.methods import METHODS, initialise
from retrace.papers.deepscalelm.model_config import model_shape
from retrace.papers.deepscalelm.moments_view import profile_figure, table
from retrace.papers.deepscalelm.recursion import Profile, input_moments, profile
from retrace.papers.deepscalelm.scheme import ModelInit
from retrace.papers.deepscalelm.shape import ModelShape


def moments(
    config: Annotated[
        Path | None,
        typer.Argument(help="A transformers config.json, or its folder (default: BERT base)", show_default=False),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help=f"Several may be given: {', '.join(METHODS)} (default: dslm)")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="An option of the method, as k=1; several may be given", metavar="KEY=VALUE"),
    ] = None,
    kind: Annotated[str | None, typer.Option(help="encoder, decoder or encoder_decoder")] = None,
    placement: Annotated[str | None, typer.Option(help="Of the norms: pre or post")] = None,
    norm: Annotated[str | None, typer.Option(help="layernorm or rmsnorm")] = None,
    activation: Annotated[str | None, typer.Option(help="relu, gelu or swiglu")] = None,
    positions: Annotated[str | None, typer.Option(help="learned or rope")] = None,
    layers: Annotated[int | None, typer.Option(help="Number of layers, of each half if there are two")] = None,
    hidden_size: Annotated[int | None, typer.Option("--hidden-size", "--hidden", help="Width")] = None,
    heads: Annotated[int | None, typer.Option(help="Number of heads")] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="Width of the feed-forward's hidden layer")] = None,
    dropout: Annotated[float | None, typer.Option(help="Of embeddings and branches")] = None,
    attention_dropout: Annotated[float | None, typer.Option(help="Of the attention weights")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Tokens, drawn by Zipf's law")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Positions of a sequence")] = None,
    input_corr: Annotated[
        float | None,
        typer.Option(help="Correlation of the embeddings behind their dropout (default: Zipf's collisions)"),
    ] = None,
    grad_corr: Annotated[float, typer.Option(help="Correlation of the gradient that enters at the top")] = 0.0,
    rows: Annotated[int, typer.Option(min=2, help="Rows of a table at most")] = 25,
    sub_blocks: Annotated[bool, typer.Option("--sub-blocks", help="A row for each sub-block")] = False,
    figure: Annotated[Path | None, typer.Option(help="Write the profiles as an SVG")] = None,
) -> None:
    """Show the moments that the theory predicts for a model at initialisation.

    The gradient's variance is 1 at the top. Nothing is built: a thousand layers take a second.

    [bold]Examples[/]

    retrace moments --layers 192 --hidden 256 --method vanilla_xavier --method dslm --figure moments.svg

    retrace moments models/llama/config.json --method vanilla_gpt2
    """
    options = {
        "kind": kind, "placement": placement, "norm": norm, "activation": activation, "positions": positions,
        "num_layers": layers, "hidden_size": hidden_size, "num_heads": heads, "intermediate_size": intermediate_size,
        "dropout": dropout, "attention_dropout": attention_dropout, "vocab_size": vocab_size, "seq_len": seq_len,
    }  # fmt: skip
    if figure is not None and figure.is_dir():
        raise ValueError(f"{figure}: is a folder: name a file to write")
    shape = model_shape(config, options)
    words = dict(_words(option or []))
    found = {
        name: _predict(shape, initialise(shape, name, **words), input_corr, grad_corr) for name in method or ["dslm"]
    }
    console = Console(width=None if Console().is_terminal else 120)
    for name, predicted in found.items():
        console.print(table(predicted, title=f"{name}: {describe(shape)}", rows=rows, sub_blocks=sub_blocks))
        for note in predicted.approximate:
            console.print(f"approximate: {note}", style="yellow", highlight=False, soft_wrap=True)
    if figure is not None:
        write_atomic(figure, profile_figure(found).standalone())


def describe(shape: ModelShape) -> str:
    """A shape in a line."""
    placed = f"{shape.placement}-{shape.norm}, {shape.activation}"
    size = f"{shape.num_layers} layers x {shape.hidden_size}, {shape.num_heads} heads, {shape.seq_len} positions"
    return f"{shape.kind}, {placed}, {size}, dropout {shape.dropout:g}/{shape.attention_dropout:g}"


def _predict(shape: ModelShape, init: ModelInit, input_corr: float | None, grad_corr: float) -> Profile:
    inputs = input_moments(shape, init)
    if input_corr is not None:
        inputs = Moments(0.0, inputs.var, input_corr)
    return profile(shape, init, inputs=inputs, top_corr=grad_corr)


def _words(given: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """KEY=VALUE as (key, number or word)."""
    for word in given:
        key, equals, value = word.partition("=")
        if not (key and equals and value):
            raise ValueError(f"--option {word}: expected KEY=VALUE, such as k=1")
        try:
            yield key, float(value)
        except ValueError:
            yield key, value
