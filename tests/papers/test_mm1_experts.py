"""What the mixture of experts promises: top-k gating, no dropped token, both losses, a start from a dense MLP."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from multimodal import EXPERTS, pack, tiny_decoder, tiny_model
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from retrace.papers.mm1.decoder import Decoder
from retrace.papers.mm1.experts import Experts, add_experts, routing
from retrace.papers.mm1.shape import ExpertsShape

torch.set_num_threads(1)
BATCH = pack([[[1, 7, 8, 9, 10, 11], [1, 12, 13, 14]], [[1, 20, 21, 22, 23, 24, 25]]])


def module(num_experts: int = 5, top_k: int = 2) -> Experts:
    shape = ExpertsShape(num_experts=num_experts, every=1, top_k=top_k)
    torch.manual_seed(0)
    experts = Experts(shape, hidden_size=8, intermediate_size=12, activation="silu")
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return experts


def one_token(experts: Experts, x_C: torch.Tensor, *, top_k: int) -> torch.Tensor:
    probs = experts.router(x_C).softmax(-1)
    best = probs.argsort(descending=True)[:top_k]
    total = torch.zeros_like(x_C)
    for number in best:
        gate, up = (experts.gate_up_XIC[number] @ x_C).chunk(2)
        total = total + probs[number] / probs[best].sum() * (experts.down_XCI[number] @ (F.silu(gate) * up))
    return total


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_each_token_gets_its_best_experts_weighted_as_if_it_were_alone(top_k: int) -> None:
    experts, x_BTC = module(top_k=top_k), torch.randn(2, 9, 8)
    expected = torch.stack([one_token(experts, x_C, top_k=top_k) for x_C in x_BTC.flatten(0, 1)]).view_as(x_BTC)
    torch.testing.assert_close(experts(x_BTC), expected, atol=1e-5, rtol=1e-5)


def test_no_token_is_dropped_when_all_want_the_same_experts() -> None:
    experts, x_BTC = module(), torch.rand(1, 40, 8)
    with torch.no_grad():
        experts.router.weight[:2] += 20.0
    expected = torch.stack([one_token(experts, x_C, top_k=2) for x_C in x_BTC[0]])
    torch.testing.assert_close(experts(x_BTC)[0], expected, atol=1e-5, rtol=1e-5)
    assert experts.routing is not None
    assert float(experts.routing.busiest) == 0.5


def test_load_balance_is_1_when_even_and_the_number_of_experts_when_one_takes_all() -> None:
    even = torch.zeros(8, 4)
    assert float(routing(even, even.softmax(-1), torch.full((4,), 4)).load_balance) == pytest.approx(1.0)
    one = torch.tensor([[50.0, 0.0, 0.0, 0.0]]).repeat(8, 1)
    assert float(routing(one, one.softmax(-1), torch.tensor([8, 0, 0, 0])).load_balance) == pytest.approx(4.0)
    logits = torch.randn(8, 4)
    found = routing(logits, logits.softmax(-1), torch.tensor([3, 5, 6, 2]))
    shares, means = torch.tensor([3, 5, 6, 2]) / 16, logits.softmax(-1).mean(0)
    torch.testing.assert_close(found.load_balance, 4 * (shares * means).sum())
    torch.testing.assert_close(found.router_z, logits.exp().sum(1).log().pow(2).mean())


def test_the_loss_adds_both_router_losses_of_every_layer_with_experts() -> None:
    decoder = tiny_decoder(EXPERTS)
    loss, metrics = decoder(BATCH)
    extra = 2 * (0.01 * metrics["router/load_balance"] + 0.001 * metrics["router/z"])  # two of four layers
    torch.testing.assert_close(loss.detach(), metrics["loss/text"] + extra)
    loss.backward()
    routers = [m.router.weight.grad for m in decoder.modules() if isinstance(m, Experts)]
    assert len(routers) == 2
    assert all(grad is not None and bool(grad.abs().sum() > 0) for grad in routers)


def test_experts_stand_in_every_kth_layer_and_nowhere_else() -> None:
    decoder = tiny_decoder(EXPERTS)
    assert [isinstance(layer.mlp, Experts) for layer in decoder.trunk.model.layers] == [False, True, False, True]


def test_copied_experts_leave_the_function_of_the_dense_model_as_it_was() -> None:
    dense = tiny_decoder()
    trunk = copy.deepcopy(dense.trunk)
    assert isinstance(trunk, LlamaForCausalLM)
    add_experts(trunk, EXPERTS, copied=True)
    sparse = Decoder(trunk, experts=EXPERTS)
    torch.testing.assert_close(sparse(BATCH)[1]["loss/text"], dense(BATCH)[1]["loss/text"], atol=1e-6, rtol=1e-6)


def test_experts_in_every_layer_are_transformers_mixtral() -> None:
    decoder = tiny_decoder(ExpertsShape(num_experts=4, every=1))
    c = decoder.trunk.config
    config = MixtralConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        intermediate_size=c.intermediate_size,
        num_local_experts=4,
        num_experts_per_tok=2,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters=c.rope_parameters,
    )
    mixtral = MixtralForCausalLM(config).eval()
    renamed = {"router.weight": "gate.weight", "gate_up_XIC": "experts.gate_up_proj", "down_XCI": "experts.down_proj"}
    tensors = {}
    for name, tensor in decoder.trunk.state_dict().items():
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        tensors[name] = tensor
    mixtral.load_state_dict(tensors)
    ids = torch.tensor([[1, 7, 8, 9, 10, 11, 30, 40]])
    with torch.no_grad():
        torch.testing.assert_close(decoder.trunk(ids).logits, mixtral(ids).logits, atol=1e-5, rtol=1e-5)


def test_padding_is_not_routed_and_changes_no_loss() -> None:
    model = tiny_model(experts=EXPERTS)
    rows = [[[1, "image", 7, 8], [1, 9]], [[1, 10, 11]]]
    short, long = model(pack(rows)), model(pack(rows, padding=30))
    torch.testing.assert_close(short.loss, long.loss, atol=0, rtol=0)
    torch.testing.assert_close(short.metrics, long.metrics, atol=0, rtol=0)


def test_experts_that_no_layer_or_token_could_have_are_refused() -> None:
    with pytest.raises(ValueError, match=r"experts\.every=5 with num_layers=4: no layer would have experts"):
        tiny_decoder(ExpertsShape(num_experts=4, every=5))
    with pytest.raises(ValueError, match=r"experts\.every=5 with 4 layers: no layer would have experts"):
        add_experts(tiny_decoder().trunk, ExpertsShape(num_experts=4, every=5), copied=True)
    with pytest.raises(ValueError, match="top_k=3 with num_experts=2"):
        ExpertsShape(num_experts=2, every=1, top_k=3)
