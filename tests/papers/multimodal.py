"""Tiny multimodal models, packed batches and runs for the tests of papers/mm1."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from retrace.core.plan import RunSpec
from retrace.core.record import Record
from retrace.core.store import Store
from retrace.papers.mm1.decoder import Decoder, build_decoder
from retrace.papers.mm1.encoder import build_encoder
from retrace.papers.mm1.model import MultimodalModel
from retrace.papers.mm1.rows import IGNORED, PackedBatch
from retrace.papers.mm1.shape import ConnectorKind, ConnectorShape, DecoderShape, ExpertsShape, VisionShape
from retrace.worker import execute

IMAGE, VOCAB, SIDE, TOKENS = 3, 50, 16, 4
VISION = VisionShape(image_size=SIDE, patch_size=4, hidden_size=24, num_layers=2, num_heads=4, intermediate_size=40)
EXPERTS = ExpertsShape(num_experts=4, every=2)

Item = int | str  # a token, or "image"


def tiny_decoder(experts: ExpertsShape | None = None, *, seed: int = 0) -> Decoder:
    shape = DecoderShape(
        hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, intermediate_size=48, experts=experts
    )
    return build_decoder(shape, vocab_size=VOCAB, seed=seed)


def tiny_model(
    kind: ConnectorKind = "c_abstractor", *, experts: ExpertsShape | None = None, conv_stem: bool = False
) -> MultimodalModel:
    torch.set_num_threads(1)
    encoder = build_encoder(VISION.model_copy(update={"conv_stem": conv_stem}), seed=0)
    connector = ConnectorShape(kind=kind, num_tokens=TOKENS, hidden_size=16, depth=1)
    model = MultimodalModel(encoder, connector, tiny_decoder(experts), image_token_id=IMAGE, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))  # norms and biases that are not 1 and 0
    return model


def pack(
    rows: Sequence[Sequence[Sequence[Item]]], *, images: torch.Tensor | None = None, padding: int = 0
) -> PackedBatch:
    """Rows of documents of items; every text token behind a document's first position is learned."""
    flat = [[place(document) for document in row] for row in rows]
    length = max(sum(map(len, row)) for row in flat) + padding
    count = sum(item == "image" for row in rows for document in row for item in document)
    if images is None:
        images = torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    columns: list[list[list[int]]] = [[], [], [], []]
    for row in flat:
        ids = [token for document in row for token in document]
        positions = [step for document in row for step in range(len(document))]
        owners = [number for number, document in enumerate(row, start=1) for _ in document]
        labels = [label for document in row for label in _labels(document)]
        for column, values, blank in zip(columns, (ids, positions, owners, labels), (0, 0, 0, IGNORED), strict=True):
            column.append(values + [blank] * (length - len(values)))
    return PackedBatch(*(torch.tensor(column) for column in columns), images)


def place(document: Sequence[Item]) -> list[int]:
    return [token for item in document for token in ([IMAGE] * TOKENS if isinstance(item, str) else [item])]


def _labels(tokens: list[int]) -> list[int]:
    return [IGNORED if token == IMAGE else token for token in tokens[1:]] + [IGNORED]


def carry_out(specs: Sequence[RunSpec], home: Path) -> dict[str, Record]:
    """Every run in this process, parents first; the records by program, the last one of each."""
    store, found = Store(home), {}
    for spec in specs:
        run = store.run(spec.id)
        run.freeze(spec, command="test")
        outcome = execute(run.path, store=store, stop=threading.Event())
        assert outcome.status == "DONE", outcome.reason
        found[spec.program] = Record.load(run.path / "record.json")
    return found
