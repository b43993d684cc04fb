"""The trunk's output projection as a value: hidden states to logits, with all that a family puts between the two.

Mixing in hidden space is mixing of logits, since weights 1 - w and w sum to one and a projection with a bias is affine.
A soft-cap comes after the mixing.

Shapes: R rows, V vocabulary, C hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class OutputHead:
    """logits = softcap * tanh(scale * (hidden @ weight^T + bias) / softcap); without a softcap no tanh."""

    weight_VC: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, trunk: PreTrainedModel) -> OutputHead:
        """As the trunk's own forward pass has it, for the families that name these things as most do."""
        layer, config = trunk.get_output_embeddings(), trunk.config
        scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(layer.weight, getattr(layer, "bias", None), scale, softcap)

    def logits(self, hidden: Tensor, *, temperature: float = 1.0, blocked: Tensor | None = None) -> Tensor:
        """Logits (..., V) in fp32 or wider, divided by a temperature; those of the `blocked` ids are -inf."""
        scores = F.linear(hidden, self.weight_VC, self.bias_V)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self.softcap is not None:
            scores = torch.tanh(scores * (self.scale / self.softcap)) * (self.softcap / temperature)
        elif self.scale != temperature:
            scores = scores * (self.scale / temperature)
        if blocked is not None and len(blocked):
            scores = scores.index_fill_(-1, blocked, -torch.inf)
        return scores

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Log-probabilities (..., V) in fp32 or wider."""
        return torch.log_softmax(self.logits(hidden), -1)
