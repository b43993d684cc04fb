"""A language model that thinks before every token: sampling, the exact loss, prediction, saving (Section 4).

`ThoughtModel` wraps any supported causal LM of transformers. A training step has two phases (specification 6.4):
thoughts are sampled without gradients, with keys and values kept, and ONE differentiable pass over text, thoughts and
true tokens gives the loss of specification 1.2. As in the official code, w multiplies the prediction after the thought.

Shapes: B sequences, T text tokens, N positions that think, P thoughts per position, M sampled tokens of a thought,
K thread tokens (START, sampled, END, S - 1 true ones), S true tokens scored, C hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from retrace.papers.quietstar.attention import ThoughtState, install, run_trunk
from retrace.papers.quietstar.config import ThoughtConfig
from retrace.papers.quietstar.losses import sample_tokens, scaled_logits
from retrace.papers.quietstar.mixing import MixingHead
from retrace.papers.quietstar.objective import Targets, ThoughtOutput, plain_objective, thought_objective


@dataclass(frozen=True)
class Prediction:
    """Next-token log-probabilities after chosen positions.

    `mixed_BNV` is the log of the mean, over thoughts, of the mixed probabilities: the prediction of a model that draws
    one of its thoughts at random. `weight_BN` is the mean mixing weight. `thoughts_BPNM` are the thoughts behind it.
    """

    base_BNV: Tensor
    mixed_BNV: Tensor
    weight_BN: Tensor
    thoughts_BPNM: Tensor


class ThoughtModel(nn.Module):
    """`trunk` with START and END embeddings and a mixing head; with `num_sampled` 0 it is the trunk as a plain LM."""

    def __init__(
        self,
        trunk: PreTrainedModel,
        config: ThoughtConfig,
        *,
        start_init_id: int,
        end_init_id: int,
        hidden_token_ids: Sequence[int] = (),
    ) -> None:
        """`*_init_id`: token whose embedding START/END begin at. `hidden_token_ids`: never sampled in a thought.

        Weights of the mixing head come from torch's global generator. Raises ValueError for a trunk that cannot be
        served exactly.
        """
        super().__init__()
        install(trunk)
        self.trunk, self.config = trunk, config
        self.register_buffer("blocked", torch.tensor(sorted(hidden_token_ids), dtype=torch.long), persistent=False)
        embedding = trunk.get_input_embeddings().weight.detach()
        thinks = config.num_sampled > 0
        start = nn.Parameter(embedding[start_init_id].clone()) if thinks and config.use_start else None
        end = nn.Parameter(embedding[end_init_id].clone()) if thinks and config.use_end else None
        self.register_parameter("start_embedding", start)
        self.register_parameter("end_embedding", end)
        self.mixing_head: MixingHead | None = None
        if thinks and config.mixing_head is not None:
            head = MixingHead(
                config.mixing_head,
                hidden_size=embedding.shape[1],
                initializer_range=getattr(trunk.config, "initializer_range", 0.02),
            )
            self.mixing_head = head.to(device=embedding.device, dtype=embedding.dtype)

    def forward(
        self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None = None, *, generator: torch.Generator
    ) -> ThoughtOutput:
        """Sample thoughts and score them: one training step's loss. `attention_mask_BT` is 1 at real tokens."""
        thoughts_BPTM = self.sample(input_ids_BT, attention_mask_BT, generator=generator)
        return self.loss(input_ids_BT, attention_mask_BT, thoughts_BPTM)

    @torch.no_grad()
    def sample(
        self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None, *, generator: torch.Generator | None
    ) -> Tensor:
        """One thought per position and `num_thoughts`, (B, P, T, M); the greedy ones without a generator."""
        batch, num_text = input_ids_BT.shape
        if self.config.num_sampled == 0:
            return input_ids_BT.new_empty(batch, self.config.num_thoughts, num_text, 0)
        text = self._text(input_ids_BT, attention_mask_BT, num_thoughts=self.config.num_thoughts, keep=True)
        thoughts_BNPM, _ = self._think(text, generator)
        return thoughts_BNPM.transpose(1, 2)

    def loss(self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None, thoughts_BPTM: Tensor) -> ThoughtOutput:
        """The loss of given thoughts in one differentiable pass. Raises ValueError for sequences that are too short."""
        config, num_text = self.config, input_ids_BT.shape[1]
        num_true = config.num_true if config.num_sampled else 1
        if num_text < num_true + 2:
            raise ValueError(
                f"sequences have {num_text} tokens, but num_true={config.num_true} needs at least "
                f"{num_true + 2}: use longer sequences or a smaller num_true"
            )
        text = self._text(input_ids_BT, attention_mask_BT, num_thoughts=config.num_thoughts)
        targets = Targets.of(input_ids_BT, text.real_BT, num_true)
        if config.num_sampled == 0:
            base_BTC = self._run(text, None, with_text=True)
            loss, _ = plain_objective(base_BTC, weight_VC=self._vocabulary, targets=targets, scale=1.0)
            return ThoughtOutput(loss, {"loss/total": loss.detach(), "loss/base": loss.detach()})
        thoughts_BTPM = thoughts_BPTM.transpose(1, 2)
        hidden_BLC = self._run(text, self._thread_embeddings(text, thoughts_BTPM), with_text=True)
        return thought_objective(
            config,
            base_BTC=hidden_BLC[:, :num_text],
            threads_BTPKC=hidden_BLC[:, num_text:].unflatten(1, (num_text, config.num_thoughts, -1)),
            thoughts_BTPM=thoughts_BTPM,
            targets=targets,
            weight_VC=self._vocabulary,
            mixing_head=self.mixing_head,
            blocked=self.blocked,
        )

    @torch.no_grad()
    def predict(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor | None,
        positions_BN: Tensor,
        *,
        generator: torch.Generator | None,
        num_thoughts: int = 1,
    ) -> Prediction:
        """What follows the text up to and including `positions_BN`, thinking only there; greedily without a generator.

        `hidden_token_ids` are kept out of thoughts only: predictions are over the whole vocabulary.
        """
        text = self._text(
            input_ids_BT, attention_mask_BT, num_thoughts=num_thoughts, positions_BN=positions_BN, keep=True
        )
        rows = torch.arange(len(positions_BN), device=positions_BN.device)[:, None]
        if self.config.num_sampled == 0:
            base_BNV = self._log_probs(self._run(text, None, with_text=True)[rows, positions_BN])
            thoughts = positions_BN.new_empty(len(positions_BN), num_thoughts, positions_BN.shape[1], 0)
            return Prediction(base_BNV, base_BNV, base_BNV.new_zeros(positions_BN.shape), thoughts)
        thoughts_BNPM, base_BTC = self._think(text, generator)
        last = [self._embed(thoughts_BNPM[..., -1:])]
        if self.end_embedding is not None:
            last.append(self.end_embedding.expand_as(last[0]))
        after_BNPC = self._run(text, torch.cat(last, 3)).unflatten(1, (*thoughts_BNPM.shape[1:3], -1))[:, :, :, -1]
        before_BNPC = base_BTC[rows, positions_BN][:, :, None].expand_as(after_BNPC)
        weight, mixed_BNPC = after_BNPC.new_ones(*after_BNPC.shape[:-1], 1), after_BNPC
        if self.mixing_head is not None:
            weight = self.mixing_head(before_BNPC, after_BNPC)
            mixed_BNPC = before_BNPC + weight * (after_BNPC - before_BNPC)
        mixed_BNV = self._log_probs(mixed_BNPC).logsumexp(2) - math.log(num_thoughts)
        base_BNV = self._log_probs(before_BNPC[:, :, 0])
        return Prediction(base_BNV, mixed_BNV, weight[..., 0].mean(-1), thoughts_BNPM.transpose(1, 2))

    @torch.no_grad()
    def predict_base(self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None, positions_BN: Tensor) -> Tensor:
        """Next-token log-probabilities after chosen positions without thinking (B, N, V): `Prediction.base_BNV`."""
        text = self._text(input_ids_BT, attention_mask_BT, num_thoughts=1)
        rows = torch.arange(len(positions_BN), device=positions_BN.device)[:, None]
        return self._log_probs(self._run(text, None, with_text=True)[rows, positions_BN])

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Every parameter once, under "trunk", "mixing_head" or "meta" (START and END); groups without any are left out.

        The official code gives the meta embeddings 100 times the trunk's learning rate (specification 1.3).
        """
        head = [] if self.mixing_head is None else list(self.mixing_head.parameters())
        meta = [p for p in (self.start_embedding, self.end_embedding) if p is not None]
        groups = {"trunk": list(self.trunk.parameters()), "mixing_head": head, "meta": meta}
        return {name: parameters for name, parameters in groups.items() if parameters}

    @property
    def num_thought_positions(self) -> int:
        """Positions behind the text that a thought and the true tokens after it take."""
        c = self.config
        return c.use_start + c.num_sampled + c.use_end + c.num_true - 1 if c.num_sampled else 0

    @property
    def _vocabulary(self) -> Tensor:
        """The output projection (V, C)."""
        return self.trunk.get_output_embeddings().weight

    def _embed(self, ids: Tensor) -> Tensor:
        return self.trunk.get_input_embeddings()(ids)

    def _log_probs(self, hidden: Tensor) -> Tensor:
        return torch.log_softmax(scaled_logits(F.linear(hidden, self._vocabulary), 1.0, None), -1)

    def _text(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor | None,
        *,
        num_thoughts: int,
        positions_BN: Tensor | None = None,
        keep: bool = False,
    ) -> _Text:
        """The text with its padding: where RoPE counts from, and whether attention has to be told of it."""
        config, real_BT = self.config, torch.ones_like(input_ids_BT, dtype=torch.bool)
        if attention_mask_BT is not None:
            real_BT = attention_mask_BT.bool()
        late = bool((real_BT[:, 1:] > real_BT[:, :-1]).any())  # padding before real text: causality does not hide it
        state = ThoughtState(
            num_text=input_ids_BT.shape[1],
            num_thoughts=num_thoughts,
            text_allowed_BT=real_BT if late else None,
            positions_BN=positions_BN,
            num_kept_slots=config.use_start + config.num_sampled + config.use_end if keep else 0,
        )
        return _Text(input_ids_BT, real_BT, (real_BT.cumsum(1) - 1).clamp(min=0), state)

    def _run(self, text: _Text, threads_BNPKC: Tensor | None, *, with_text: bool = False) -> Tensor:
        """One pass over [text | threads]; hidden states (B, L, C)."""
        embeds, ids = [], []
        if with_text:
            embeds, ids = [self._embed(text.input_ids_BT)], [text.position_ids_BT]
        num_new = 0
        if threads_BNPKC is not None:
            num_new = threads_BNPKC.shape[3]
            steps_K = torch.arange(1, num_new + 1, device=threads_BNPKC.device) + text.state.num_done
            at_BN = text.position_ids_BT
            if text.state.positions_BN is not None:
                at_BN = at_BN.gather(1, text.state.positions_BN)
            slots = (at_BN[:, :, None, None] + steps_K).expand(threads_BNPKC.shape[:-1])
            embeds.append(threads_BNPKC.flatten(1, 3))
            ids.append(slots.flatten(1))
        return run_trunk(
            self.trunk,
            torch.cat(embeds, 1),
            position_ids_BL=torch.cat(ids, 1),
            state=text.state,
            with_text=with_text,
            num_new=num_new,
        )

    def _think(self, text: _Text, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Sample thoughts (B, N, P, M) token by token; also the text's hidden states. The last token is not fed yet."""
        base_BTC = self._run(text, None, with_text=True)
        rows = torch.arange(len(base_BTC), device=base_BTC.device)[:, None]
        positions_BN = text.state.positions_BN
        hidden = (base_BTC if positions_BN is None else base_BTC[rows, positions_BN])[:, :, None]
        if self.start_embedding is not None:  # one START serves all thoughts of a position
            start = self.start_embedding.expand(*hidden.shape[:2], 1, 1, -1)
            hidden = self._run(text, start).unflatten(1, hidden.shape[1:3])
        tokens: list[Tensor] = []
        for step in range(self.config.num_sampled):
            if step > 0:
                shape = tokens[-1].shape
                hidden = self._run(text, self._embed(tokens[-1])[:, :, :, None]).unflatten(1, shape[1:])
            tokens.append(
                sample_tokens(
                    hidden,
                    weight_VC=self._vocabulary,
                    num_thoughts=text.state.num_thoughts,
                    temperature=self.config.sample_temperature,
                    blocked=self.blocked,
                    generator=generator,
                )
            )
        return torch.stack(tokens, -1), base_BTC

    def _thread_embeddings(self, text: _Text, thoughts_BTPM: Tensor) -> Tensor:
        """[START, sampled tokens, END, the S - 1 true tokens after the position] of every thread, (B, T, P, K, C)."""
        num_true, num_thoughts = self.config.num_true, thoughts_BTPM.shape[2]
        true_BTS = F.pad(text.input_ids_BT, (0, num_true - 1)).unfold(1, num_true, 1)[..., 1:]
        parts = [
            self._embed(thoughts_BTPM),
            self._embed(true_BTS)[:, :, None].expand(-1, -1, num_thoughts, -1, -1),
        ]
        meta_shape = (*thoughts_BTPM.shape[:3], 1, -1)
        if self.end_embedding is not None:
            parts.insert(1, self.end_embedding.expand(meta_shape))
        if self.start_embedding is not None:
            parts.insert(0, self.start_embedding.expand(meta_shape))
        return torch.cat(parts, 3)


@dataclass
class _Text:
    input_ids_BT: Tensor
    real_BT: Tensor
    position_ids_BT: Tensor
    state: ThoughtState


def save_weights(module: nn.Module, path: Path) -> None:
    """Write the module's weights to a safetensors file, each shared tensor once."""
    tied = _tied_names(module)
    tensors = {name: tensor.contiguous() for name, tensor in module.state_dict().items() if name not in tied}
    save_file(tensors, path)


def load_weights(module: nn.Module, path: Path, *, prefix: str = "") -> None:
    """Read what `save_weights` wrote, bit for bit; `prefix="trunk."` reads the trunk of a saved ThoughtModel.

    Raises ValueError when the file and the module do not have the same weights.
    """
    tensors = {name.removeprefix(prefix): t for name, t in load_file(path).items() if name.startswith(prefix)}
    expected = set(module.state_dict()) - _tied_names(module)
    if set(tensors) != expected:
        missing, unknown = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
        raise ValueError(
            f"{path} does not fit the model: missing {missing[:3]}, unexpected {unknown[:3]} "
            f"({len(missing)} and {len(unknown)} in all): build the model from the config it was saved with"
        )
    module.load_state_dict(tensors, strict=False)


def _tied_names(module: nn.Module) -> set[str]:
    """Names in the state dict whose tensor stands there already under an earlier name."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    tied = set()
    for name, tensor in module.state_dict().items():
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if key in seen:
            tied.add(name)
        seen.add(key)
    return tied
