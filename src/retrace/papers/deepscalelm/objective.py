"""What a model is trained to predict, by its kind, and how well it does so on held-out text.

An encoder: masked tokens, as BERT does. A decoder: each next token. An encoder-decoder: the second half of a window
from the first. B sequences, T positions, D hidden_size, V vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from retrace.core.data import generator
from retrace.papers.deepscalelm.config import BOS, MASK, NUM_SPECIAL
from retrace.papers.deepscalelm.model import IGNORED, Transformer
from retrace.papers.deepscalelm.shape import ModelShape

MASKED, RANDOM = 0.8, 0.1  # of the tokens to predict; the rest stays as it is
AT_ONCE = 32  # windows in one pass over held-out text


@dataclass(frozen=True)
class Example:
    """What the model reads, and what it should say; labels of -100 count for nothing."""

    input_ids_BT: Tensor
    labels_BT: Tensor
    decoder_input_ids_BT: Tensor | None = None


def examples(ids_BT: Tensor, shape: ModelShape, *, mask_share: float, noise: torch.Generator) -> Example:
    """Inputs and labels of whole windows; `noise` is on the device of the ids."""
    if shape.kind == "encoder":
        return mask(ids_BT, vocab_size=shape.vocab_size, share=mask_share, noise=noise)
    if shape.kind == "decoder":
        return Example(ids_BT[:, :-1], ids_BT[:, 1:])
    half = ids_BT.shape[1] // 2
    source, target = ids_BT[:, :half], ids_BT[:, half:]
    before = torch.cat([torch.full_like(target[:, :1], BOS), target[:, :-1]], 1)
    return Example(source, target, before)


def mask(ids_BT: Tensor, *, vocab_size: int, share: float, noise: torch.Generator) -> Example:
    """A `share` of the tokens to be predicted: 80 % of them masked, 10 % random, 10 % as they are (Section 5.1)."""

    def uniform() -> Tensor:
        return torch.rand(ids_BT.shape, generator=noise, device=ids_BT.device)

    chosen_BT, how_BT = uniform() < share, uniform()
    other_BT = torch.randint(NUM_SPECIAL, vocab_size, ids_BT.shape, generator=noise, device=ids_BT.device)
    read_BT = ids_BT.masked_fill(chosen_BT & (how_BT < MASKED), MASK)
    read_BT = torch.where(chosen_BT & (how_BT >= MASKED) & (how_BT < MASKED + RANDOM), other_BT, read_BT)
    return Example(read_BT, ids_BT.masked_fill(~chosen_BT, IGNORED))


class Predictor(nn.Module):
    """A transformer whose forward pass is its loss, so that every way of wrapping a model sees all of it."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, example: Example) -> Tensor:
        """Mean loss in nats over the labels."""
        hidden_BTD = self.model(example.input_ids_BT, decoder_input_ids_BT=example.decoder_input_ids_BT)
        return self.model.loss(hidden_BTD, example.labels_BT)


@torch.inference_mode()
def heldout_loss(
    model: Transformer, ids_WT: Tensor, *, mask_share: float, unigram_V: Tensor, device: str
) -> dict[str, float]:
    """`loss` in nats a predicted token, without dropout; `gain`: by how much that is below the unigram model's.

    Always the same masks. A model that has learned nothing but frequencies has a gain of 0.
    """
    training, noise = model.training, generator(0, "masks of held-out text")
    model.eval()
    loss = single = count = 0.0
    for some_BT in ids_WT.split(AT_ONCE):
        example = examples(some_BT.long(), model.shape, mask_share=mask_share, noise=noise)
        labels_M = example.labels_BT[example.labels_BT != IGNORED]
        beside = None if example.decoder_input_ids_BT is None else example.decoder_input_ids_BT.to(device)
        moved = Example(example.input_ids_BT.to(device), example.labels_BT.to(device), beside)
        loss += float(Predictor(model)(moved)) * len(labels_M)
        single -= float(unigram_V[labels_M].sum())
        count += len(labels_M)
    model.train(training)
    return {"loss": loss / count, "gain": (single - loss) / count}
