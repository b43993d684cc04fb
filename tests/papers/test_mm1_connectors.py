"""What connectors promise: the pooling windows, the C-Abstractor, and any grid to any number of tokens."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrace.papers.mm1.connectors import CAbstractor, build_connector, pooled
from retrace.papers.mm1.shape import ConnectorKind, ConnectorShape

torch.set_num_threads(1)
KINDS: list[ConnectorKind] = ["average_pool", "attention_pool", "c_abstractor"]
GRIDS = [(4, 2), (16, 8), (24, 12), (27, 12), (27, 8), (16, 12), (5, 3), (3, 3)]


def connector(kind: ConnectorKind, num_tokens: int, *, grid: int, depth: int = 2, in_size: int = 12) -> nn.Module:
    shape = ConnectorShape(kind=kind, num_tokens=num_tokens, hidden_size=16, depth=depth)
    return build_connector(shape, grid=grid, in_size=in_size, out_size=20, seed=0)


@pytest.mark.parametrize(("grid", "side"), GRIDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_connector_gives_any_number_of_tokens_from_any_grid(kind: ConnectorKind, grid: int, side: int) -> None:
    model = connector(kind, side * side, grid=grid)
    tokens_MNC = model(torch.randn(2, grid * grid, 12))
    assert tokens_MNC.shape == (2, side * side, 20)
    tokens_MNC.square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]


@pytest.mark.parametrize(("grid", "side"), GRIDS)
def test_pooling_windows_are_those_of_the_specification(grid: int, side: int) -> None:
    map_MggD = torch.randn(2, grid, grid, 3)
    found = pooled(map_MggD, side)
    spans = [(i * grid // side, math.ceil((i + 1) * grid / side)) for i in range(side)]
    for row, (top, bottom) in enumerate(spans):
        for column, (left, right) in enumerate(spans):
            expected = map_MggD[:, top:bottom, left:right].mean((1, 2))
            torch.testing.assert_close(found[:, row, column], expected, atol=1e-5, rtol=1e-5)


def test_windows_of_the_final_model_are_three_wide_and_those_of_27_to_8_as_listed() -> None:
    def widths(grid: int, side: int) -> list[int]:
        marks = torch.eye(grid)[:, None, :, None].expand(grid, grid, grid, 1)
        return [int((pooled(marks, side)[:, 0, i, 0] > 0).sum()) for i in range(side)]

    assert widths(27, 12) == [3] * 12
    assert widths(27, 8) == [4, 4, 5, 4, 4, 5, 4, 4]


def test_tokens_of_average_pooling_stand_in_raster_order() -> None:
    model, features = connector("average_pool", 4, grid=4), torch.zeros(1, 16, 12)
    changed = features.clone()
    changed[0, 3] = 1.0  # the top right corner of the 4 x 4 patches
    differs = (model(features) != model(changed)).any(-1)[0]
    assert differs.tolist() == [False, True, False, False]


def plain_norm(x_MDgg: Tensor, layer: nn.LayerNorm) -> Tensor:
    mean = x_MDgg.mean(1, keepdim=True)
    variance = ((x_MDgg - mean) ** 2).mean(1, keepdim=True)
    return (x_MDgg - mean) / (variance + 1e-5).sqrt() * layer.weight[:, None, None] + layer.bias[:, None, None]


def plain_block(x_MDgg: Tensor, block: nn.Module) -> Tensor:
    """RegNet's bottleneck as convolutions over channels first, from the specification's list."""

    def conv1(x: Tensor, layer: nn.Linear) -> Tensor:
        return F.conv2d(x, layer.weight[:, :, None, None], layer.bias)

    y = F.silu(plain_norm(conv1(x_MDgg, block.reduce), block.reduce_norm))
    rows, columns = y.shape[2:]
    padded = F.pad(y, (1, 1, 1, 1))
    mixed = sum(
        padded[:, :, i : i + rows, j : j + columns] * block.mix.weight[:, 0, i, j][:, None, None]
        for i in range(3)
        for j in range(3)
    )
    y = F.silu(plain_norm(mixed, block.mix_norm))
    gate = conv1(F.silu(conv1(F.adaptive_avg_pool2d(y, 1), block.squeeze)), block.excite)
    y = plain_norm(conv1(y * torch.sigmoid(gate), block.expand), block.expand_norm)
    if isinstance(block.shortcut, nn.Sequential):
        x_MDgg = plain_norm(conv1(x_MDgg, block.shortcut[0]), block.shortcut[1])
    return F.silu(y + x_MDgg)


@pytest.mark.parametrize(("grid", "side"), [(6, 3), (9, 4)])
def test_c_abstractor_equals_a_plain_implementation_with_the_same_weights(grid: int, side: int) -> None:
    model = connector("c_abstractor", side * side, grid=grid, depth=3)
    assert isinstance(model, CAbstractor)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    features_MPD = torch.randn(2, grid * grid, 12)
    x = (features_MPD + model.positions).transpose(1, 2).reshape(2, 12, grid, grid)
    for block in model.before:
        x = plain_block(x, block)
    x = F.adaptive_avg_pool2d(x, side)
    for block in model.behind:
        x = plain_block(x, block)
    expected = model.read_out[2](F.silu(model.read_out[0](x.flatten(2).transpose(1, 2))))
    torch.testing.assert_close(model(features_MPD), expected, atol=1e-5, rtol=1e-5)
    assert len(model.before) == len(model.behind) == 3


def test_six_bottlenecks_of_honeybees_size_have_the_weights_that_the_specification_counts() -> None:
    with torch.device("meta"):
        shape = ConnectorShape(kind="c_abstractor", num_tokens=144, hidden_size=1024, depth=3)
        model = CAbstractor(shape, grid=24, in_size=1024, out_size=2048)
    blocks = sum(p.numel() for part in (model.before, model.behind) for p in part.parameters())
    assert blocks == pytest.approx(6 * 2.5 * 1024**2, rel=0.02)
    assert isinstance(model.before[0].shortcut, nn.Identity)


def test_with_zero_init_a_new_c_abstractor_is_pooling_between_activations_and_all_of_it_learns() -> None:
    shape = ConnectorShape(kind="c_abstractor", num_tokens=4, hidden_size=12, depth=2, zero_init=True)
    model = build_connector(shape, grid=4, in_size=12, out_size=20, seed=0)
    features_MPD = torch.randn(2, 16, 12)
    seen = F.silu(F.silu(features_MPD + model.positions))
    means = F.silu(F.silu(seen.view(2, 2, 2, 2, 2, 12).mean((2, 4)).flatten(1, 2)))
    torch.testing.assert_close(model(features_MPD), model.read_out(means), atol=1e-6, rtol=1e-6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # the first step moves the norms off zero, behind which nothing learned before
        optimizer.zero_grad()
        model(features_MPD).square().sum().backward()
        optimizer.step()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]


def test_depth_0_is_pooling_with_a_two_layer_read_out() -> None:
    model = connector("c_abstractor", 4, grid=4, depth=0)
    assert isinstance(model, CAbstractor)
    features_MPD = torch.randn(2, 16, 12)
    means = features_MPD.view(2, 2, 2, 2, 2, 12).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(model(features_MPD), model.read_out(means), atol=1e-6, rtol=1e-6)
    assert model.positions is None


def test_attention_pooling_equals_softmax_written_out() -> None:
    model = connector("attention_pool", 7, grid=3)
    features_MPD = torch.randn(2, 9, 12)
    x, layer = model.norm(features_MPD), model.attention
    q, k, v = (
        F.linear(y, w, b)
        for y, w, b in zip(
            (model.queries.expand(2, -1, -1), x, x),
            layer.in_proj_weight.chunk(3),
            layer.in_proj_bias.chunk(3),
            strict=True,
        )
    )
    heads = [y.unflatten(-1, (4, 3)).transpose(1, 2) for y in (q, k, v)]
    shares = (heads[0] @ heads[1].mT / 3**0.5).softmax(-1)
    expected = model.project(layer.out_proj((shares @ heads[2]).transpose(1, 2).flatten(2)))
    torch.testing.assert_close(model(features_MPD), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_connector_takes_images_of_another_resolution_than_it_was_built_for(kind: ConnectorKind) -> None:
    model = connector(kind, 4, grid=4)
    assert model(torch.randn(2, 49, 12)).shape == (2, 4, 20)


def test_tokens_that_a_grid_cannot_give_are_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"num_tokens=25 with kind=average_pool: a grid of 4x4 .* at most 16; use"):
        connector("average_pool", 25, grid=4)
    with pytest.raises(ValueError, match="num_tokens=8 with kind=c_abstractor: expected a square, such as 9"):
        connector("c_abstractor", 8, grid=4)
    assert connector("attention_pool", 25, grid=4)(torch.randn(1, 16, 12)).shape == (1, 25, 20)
