"""Low-rank adapters on the trunk (LoRA, arXiv 2106.09685), through peft; the only file that imports it.

Adapters, mixing head, START and END train; the trunk's own weights are frozen. What a run leaves is merged, so that
everything that reads a model's folder sees a trunk like any other.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from retrace.core.data import derive_seed
from retrace.papers.quietstar.config import Lora

ADAPTER = "default"


def add_adapters(trunk: PreTrainedModel, lora: Lora, *, seed: int) -> None:
    """Freeze the trunk and put adapters beside its linear layers, in place; at first they add nothing.

    Raises ValueError for a target that is no linear layer of the trunk's body. (The output projection is none: its
    weight is used without its module, so adapters there would be passed by.)
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = {
        path.rpartition(".")[2]: isinstance(module, Conv1D)  # whose weight lies the other way around
        for path, module in trunk.base_model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    unknown = sorted(set(lora.target_modules) - linear.keys())
    if unknown:
        raise ValueError(
            f"train.lora.target_modules: trunk family '{trunk.config.model_type}' has no linear layer '{unknown[0]}' "
            f"in its body; it has: {', '.join(sorted(linear))}"
        )
    torch.manual_seed(derive_seed(seed, "adapters"))
    targets, turned = list(lora.target_modules), linear[lora.target_modules[0]]
    settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, fan_in_fan_out=turned)
    inject_adapter_in_model(settings, trunk, adapter_name=ADAPTER)


def merged(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The `tensors` of a model with adapters as those of one without: W + alpha / rank * B A, computed in fp32.

    `tensors` are whole ones by name; there may be none, in a process that keeps none.
    """
    found = dict(tensors)
    for path, module in model.named_modules():
        if not tensors or ADAPTER not in getattr(module, "lora_A", {}):
            continue
        down, up = (found.pop(f"{path}.lora_{side}.{ADAPTER}.weight").float() for side in "AB")
        added = module.scaling[ADAPTER] * (up @ down)
        for kind in ("weight", "bias"):
            name = f"{path}.base_layer.{kind}"
            if name in found:
                found[f"{path}.{kind}"] = found.pop(name)
        weight = found[f"{path}.weight"]
        added = added.T if isinstance(module.base_layer, Conv1D) else added
        found[f"{path}.weight"] = (weight.float() + added).to(weight.dtype)
    return found
