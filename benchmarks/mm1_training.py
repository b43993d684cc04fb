"""A training step of MM1's model: against transformers' LLaVA, against itself without experts, and its connectors.

    python benchmarks/mm1_training.py [--cases laptop small] [--repeats 5]

A step is forward and backward in fp32 on one thread. Times are the smallest CPU times of the repeats, and the two sides
of a ratio are measured in turn in one process. Documents are drawn 45 : 45 : 10 from captions (an image and 5 to 12
tokens), interleaved documents (3 to 6 images, 4 to 10 tokens each) and text (20 to 100 tokens); "captions" has captions
alone, whose lengths differ least.

LLaVA has the same weights, and every patch is a token on both sides (its projector knows no other way), so that both
compute the same loss for the same documents, which is asserted first. It gets them as its collator gives them: one
document a row, padded on the right to the longest. We get them packed into rows. "Useful" are tokens that are no
padding, as a share of those that the layers compute; in attention ours are padded within buckets of similar length.

Experts: 8 or 64, top 2, in every second layer, against a dense decoder whose MLPs are 1.5 times as wide: as many
active parameters. Connector: its forward and backward as a share of the whole step.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaConfig, LlavaForConditionalGeneration

from retrace.core.provenance import processor
from retrace.papers.mm1.attention import Tokens
from retrace.papers.mm1.decoder import build_decoder
from retrace.papers.mm1.encoder import PIXELS, VisionEncoder
from retrace.papers.mm1.model import MultimodalModel
from retrace.papers.mm1.rows import IGNORED, PackedBatch
from retrace.papers.mm1.shape import ConnectorKind, ConnectorShape, DecoderShape, ExpertsShape

IMAGE, VOCAB, WINDOW = 3, 4096, 512
RESULTS = Path(__file__).parent / "results" / "mm1_training.json"
KINDS: tuple[ConnectorKind, ...] = ("average_pool", "attention_pool", "c_abstractor")


@dataclass(frozen=True)
class Case:
    """Sizes of the model and of a batch; `side` pixels in patches of 4."""

    hidden: int
    layers: int
    vision_hidden: int
    vision_layers: int
    side: int
    num_tokens: int  # of an image, where a connector reduces them
    documents: int


CASES = {
    "laptop": Case(96, 3, 48, 2, side=24, num_tokens=9, documents=32),
    "small": Case(256, 4, 128, 4, side=24, num_tokens=9, documents=32),
}

Document = list[int | None]  # tokens; None is an image


def draw(count: int, *, captions: bool) -> list[Document]:
    """Documents as the module's docstring says."""
    dice, found = random.Random(0), []
    for _ in range(count):
        kind = "caption" if captions else dice.choices(["caption", "interleaved", "text"], [45, 45, 10])[0]
        images = {"caption": 1, "interleaved": dice.randint(3, 6), "text": 0}[kind]
        low, high = {"caption": (5, 12), "interleaved": (4, 10), "text": (20, 100)}[kind]
        document: Document = []
        for _ in range(max(1, images)):
            document += [None] * min(1, images) + [dice.randrange(5, VOCAB) for _ in range(dice.randint(low, high))]
        found.append(document)
    return found


def build(
    case: Case, kind: ConnectorKind, num_tokens: int, *, depth: int = 3, experts: int = 0, wider: float = 1.0
) -> MultimodalModel:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        image_size=case.side,
        patch_size=4,
        hidden_size=case.vision_hidden,
        num_hidden_layers=case.vision_layers,
        num_attention_heads=4,
        intermediate_size=4 * case.vision_hidden,
    )
    shape = DecoderShape(
        hidden_size=case.hidden,
        num_layers=case.layers,
        num_heads=8,
        num_kv_heads=8,
        intermediate_size=int(wider * 8 * case.hidden / 3),
        experts=ExpertsShape(num_experts=experts, every=2) if experts else None,
    )
    encoder = VisionEncoder(CLIPVisionModel(vision), pixels=PIXELS["clip_vision_model"])
    connector = ConnectorShape(kind=kind, num_tokens=num_tokens, hidden_size=case.vision_hidden, depth=depth)
    return MultimodalModel(encoder, connector, build_decoder(shape, vocab_size=VOCAB, seed=0), image_token_id=IMAGE)


def as_llava(model: MultimodalModel) -> LlavaForConditionalGeneration:
    """transformers' model with the same weights; every patch must be a token."""
    config = LlavaConfig(
        vision_config=model.encoder.trunk.config.to_dict(),
        text_config=model.decoder.trunk.config.to_dict(),
        image_token_index=IMAGE,
        projector_hidden_act="silu",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    llava = LlavaForConditionalGeneration(config)
    llava.set_attn_implementation("sdpa")
    llava.model.vision_tower.load_state_dict(model.encoder.trunk.state_dict())
    llava.model.language_model.load_state_dict(model.decoder.trunk.model.state_dict())
    read_out = model.connector.read_out
    assert isinstance(read_out, nn.Sequential)
    for ours, theirs in ((0, "linear_1"), (2, "linear_2")):
        layer = getattr(llava.model.multi_modal_projector, theirs)
        layer.load_state_dict(read_out[ours].state_dict())
    return llava


def tokens_and_labels(document: Document, num_tokens: int) -> tuple[list[int], list[int]]:
    """Ids, and for each the id itself or IGNORED, as transformers' labels are."""
    ids = [token for item in document for token in ([IMAGE] * num_tokens if item is None else [item])]
    return ids, [IGNORED if token == IMAGE else token for token in ids]


def padded(documents: list[Document], num_tokens: int, images: Tensor) -> dict[str, Tensor]:
    """One document a row."""
    pairs = [tokens_and_labels(document, num_tokens) for document in documents]
    length = max(len(ids) for ids, _ in pairs)
    columns = [[ids + [0] * (length - len(ids)) for ids, _ in pairs]]
    columns += [[[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in pairs]]
    columns += [[labels + [IGNORED] * (length - len(labels)) for _, labels in pairs]]
    names = ("input_ids", "attention_mask", "labels")
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in PIXELS["clip_vision_model"])
    return {**{n: torch.tensor(c) for n, c in zip(names, columns, strict=True)}, "pixel_values": (images - mean) / std}


def packed(documents: list[Document], num_tokens: int, images: Tensor) -> PackedBatch:
    """Rows of up to WINDOW positions, in the order of the documents."""
    rows: list[list[tuple[list[int], list[int]]]] = [[]]
    for document in documents:
        pair = tokens_and_labels(document, num_tokens)
        if sum(len(ids) for ids, _ in rows[-1]) + len(pair[0]) > WINDOW:
            rows.append([])
        rows[-1].append(pair)
    width = max(sum(len(ids) for ids, _ in row) for row in rows)
    columns: list[list[list[int]]] = [[], [], [], []]
    for row in rows:
        ids = [token for tokens, _ in row for token in tokens]
        positions = [step for tokens, _ in row for step in range(len(tokens))]
        owners = [number for number, (tokens, _) in enumerate(row, 1) for _ in tokens]
        shifted = [label for _, labels in row for label in [*labels[1:], IGNORED]]
        blank = width - len(ids)
        for column, values, fill in zip(columns, (ids, positions, owners, shifted), (0, 0, 0, IGNORED), strict=True):
            column.append(values + [fill] * blank)
    input_ids, position_ids, document_ids, labels = (torch.tensor(column) for column in columns)
    return PackedBatch(input_ids, position_ids, document_ids, labels, images)


def compare(*sides: tuple[nn.Module, Callable[[], Tensor]], repeats: int) -> list[float]:
    """CPU seconds of each model's step with its backward pass, in turn; the first round is not counted."""
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(repeats + 1):
        for (model, step), seconds in zip(sides, times, strict=True):
            model.zero_grad()
            start = time.process_time()
            step().backward()
            seconds.append(time.process_time() - start)
    return [min(seconds[1:]) for seconds in times]


def against_llava(case: Case, *, captions: bool, repeats: int) -> dict[str, float]:
    patches = (case.side // 4) ** 2
    model = build(case, "c_abstractor", patches, depth=0)
    llava, documents = as_llava(model), draw(case.documents, captions=captions)
    images = torch.rand(sum(item is None for document in documents for item in document), 3, case.side, case.side)
    theirs, ours = padded(documents, patches, images), packed(documents, patches, images)
    model.train()
    llava.train()
    with torch.no_grad():
        losses = model(ours).loss, llava(**theirs).loss
    assert abs(losses[0] - losses[1]) < 1e-4, losses
    sides = ((model, lambda: model(ours).loss), (llava, lambda: llava(**theirs, use_cache=False).loss))
    ours_s, theirs_s = compare(*sides, repeats=repeats)
    tokens = Tokens.of(ours)
    useful = len(tokens.kept_T)
    return {
        "tokens": useful,
        "ours_tokens_per_second": useful / ours_s,
        "llava_tokens_per_second": useful / theirs_s,
        "ratio": theirs_s / ours_s,
        "useful": useful / len(tokens.position_ids_T),
        "useful_in_attention": useful / sum(bucket.numel() for bucket in tokens.documents.buckets_NK),
        "useful_of_rows": useful / ours.input_ids_BL.numel(),
        "useful_llava": useful / theirs["input_ids"].numel(),
    }


def experts_against_dense(case: Case, repeats: int) -> dict[str, float]:
    documents = draw(case.documents, captions=False)
    images = torch.rand(sum(item is None for document in documents for item in document), 3, case.side, case.side)
    batch = packed(documents, case.num_tokens, images)
    layers = case.layers // 2 / case.layers  # the share that has experts
    dense = build(case, "c_abstractor", case.num_tokens, wider=1 + layers)
    few, many = (build(case, "c_abstractor", case.num_tokens, experts=count) for count in (8, 64))
    found = compare(*((m, lambda m=m: m(batch).loss) for m in (dense, few, many)), repeats=repeats)
    return {"experts_8_over_dense": found[1] / found[0], "experts_64_over_dense": found[2] / found[0]}


def connector_share(case: Case, kind: ConnectorKind, repeats: int) -> float:
    documents = draw(case.documents, captions=False)
    images = torch.rand(sum(item is None for document in documents for item in document), 3, case.side, case.side)
    batch, model = packed(documents, case.num_tokens, images), build(case, kind, case.num_tokens)
    features = model.encoder(images).detach().requires_grad_()
    sides = ((model, lambda: model(batch).loss), (model, lambda: model.connector(features).sum()))
    whole, part = compare(*sides, repeats=repeats)
    return part / whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name in arguments.cases:
        case, repeats = CASES[name], arguments.repeats
        found[name] = {
            "case": vars(case),
            "mixture": against_llava(case, captions=False, repeats=repeats),
            "captions": against_llava(case, captions=True, repeats=repeats),
            "experts": experts_against_dense(case, repeats),
            "connector_share": {kind: connector_share(case, kind, repeats) for kind in KINDS},
        }
        print(name, json.dumps(found[name], indent=1), flush=True)
    machine = {"processor": processor(), "torch": torch.__version__, "threads": 1}
    RESULTS.write_text(json.dumps({**machine, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
