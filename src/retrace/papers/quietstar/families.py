"""Which trunks can think: each one is tried on four tokens before it is used, and refused by name if it differs.

Thoughts are exact where a trunk sends all attention through transformers' interface, lets position ids say where a
token stands, and makes logits of its last hidden states by a projection. That is tested, not listed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from retrace.papers.quietstar.attention import NAME, NotHandedOverError, ThoughtState, run_trunk
from retrace.papers.quietstar.head import OutputHead
from retrace.papers.quietstar.memory import Reach

INSTEAD = "use a family such as llama, mistral, qwen2, gemma or gpt_neox"
NUM_TRIED = 4  # tokens: three of text, and at the second of them a thread of the last two


def install(trunk: PreTrainedModel) -> None:
    """Make `trunk` use thought attention. Raises ValueError for a family that cannot be served exactly."""
    family = trunk.config.model_type
    if not trunk._can_set_attn_implementation():
        why = "it ignores transformers' attention interface, so its thoughts would see each other"
        raise ValueError(f"trunk family '{family}' can't be served exactly: {why}; {INSTEAD}")
    if trunk.config._attn_implementation == NAME:
        return
    device, training = trunk.get_input_embeddings().weight.device, trunk.training
    if device.type == "meta":
        trunk.set_attn_implementation(NAME)
        return
    trunk.eval()
    try:
        with torch.no_grad():
            _try(trunk, torch.arange(NUM_TRIED, device=device)[None])
    except NotHandedOverError:
        why = "it does not hand its keyword arguments on to attention, which so can't tell thoughts from text"
        raise ValueError(f"trunk family '{family}' can't be served exactly: {why}; {INSTEAD}") from None
    except ValueError as error:
        raise ValueError(f"trunk family '{family}' can't be served exactly: {error}; {INSTEAD}") from None
    finally:
        trunk.train(training)


def _try(trunk: PreTrainedModel, ids_1T: Tensor) -> None:
    """Compare a thought with a plain run of the same tokens, and our logits with the trunk's own."""
    first = 2
    trunk.set_attn_implementation("eager")
    embeds_1TC = trunk.get_input_embeddings()(ids_1T)
    positions_1T = torch.arange(NUM_TRIED, device=ids_1T.device)[None]
    plain_1TC = trunk.base_model(inputs_embeds=embeds_1TC, position_ids=positions_1T, use_cache=False).last_hidden_state
    logits_1TV = trunk(input_ids=ids_1T, use_cache=False).logits
    trunk.set_attn_implementation(NAME)
    state = ThoughtState(Reach(3, range(1, 2)), num_thoughts=1, num_slots=2)
    text_1LC = run_trunk(trunk, embeds_1TC[:, :3], position_ids_BL=positions_1T[:, :3], state=state, num_new=0)
    thread_1KC = run_trunk(
        trunk, embeds_1TC[:, first:], position_ids_BL=positions_1T[:, first:], state=state, num_new=2
    )
    for ours, theirs in ((text_1LC, plain_1TC[:, :3]), (thread_1KC, plain_1TC[:, first:])):
        if not _close(ours, theirs):
            raise ValueError("its hidden states in a thought are not those of a plain run of the same tokens")
    if not _close(OutputHead.of(trunk).logits(plain_1TC), logits_1TV):
        raise ValueError("it makes its logits in a way of its own, which the loss would miss")


def _close(ours: Tensor, theirs: Tensor) -> bool:
    """Equal up to rounding, far below the difference that another key or another position makes."""
    tolerance = 1e-3 if theirs.dtype in (torch.float32, torch.float64) else 0.1
    return bool((ours.float() - theirs.float()).abs().max() <= tolerance * theirs.float().abs().max())
