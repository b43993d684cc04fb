"""The shape of a transformer, as far as its moments and its initialisation depend on it. No torch.

What the numbers mean is what they mean in transformers' configs; names follow them too.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from retrace.core.config import Frozen

Kind = Literal["encoder", "decoder", "encoder_decoder"]
Placement = Literal["pre", "post"]
Activation = Literal["relu", "gelu", "swiglu"]


class ModelShape(Frozen):
    """One transformer. An encoder-decoder has `num_layers` in each half."""

    kind: Kind  # encoder: bidirectional, masked tokens; decoder: causal, next token
    placement: Placement  # of the norms; "post" also has one on the embeddings, as in the official code (Section 3.4)
    norm: Literal["layernorm", "rmsnorm"]
    activation: Activation
    positions: Literal["learned", "rope"]
    num_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    dropout: float = Field(ge=0, lt=1)  # of the embeddings and of each residual branch
    attention_dropout: float = Field(ge=0, lt=1)  # of the attention weights
    vocab_size: int = Field(ge=2)
    seq_len: int = Field(ge=2)

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.num_heads:
            choices = [n for n in range(1, self.hidden_size + 1) if self.hidden_size % n == 0]
            near = sorted(choices, key=lambda n: abs(n - self.num_heads))[:3]
            raise ValueError(
                f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}: use "
                f"{' or '.join(map(str, sorted(near)))}"
            )
        if self.positions == "rope" and self.hidden_size // self.num_heads % 2:
            raise ValueError(
                f"positions=rope needs an even head size, and hidden_size/num_heads is "
                f"{self.hidden_size // self.num_heads}: change num_heads, or use positions=learned"
            )
        return self

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_tables(self) -> int:
        """Embedding tables whose rows are added: tokens, and positions where they are learned."""
        return 2 if self.positions == "learned" else 1
