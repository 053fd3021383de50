"""Optimizers of a module's trainable tensors, and the learning rate as a function of images seen."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pixelgrow.training.settings import TrainSettings

FUSED = ("cpu", "cuda", "xpu", "mps")  # devices with a fused AdamW (torch.optim.adamw)


def rate(images: float, settings: TrainSettings) -> float:
    """Factor in [0, 1] on the learning rate when `images` have been seen: linear warm-up, then decay.

    cosine falls to 0 at the end of the run, inverse_sqrt as 1 / sqrt(images) from the end of the warm-up.
    """
    warmup = settings.warmup or 0
    up = min(1.0, images / warmup) if warmup else 1.0
    if settings.decay == "cosine":
        done = (images - warmup) / max(1, settings.images - warmup)
        return up * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done))))
    if settings.decay == "inverse_sqrt":
        return up * math.sqrt(max(1, warmup) / max(images, warmup, 1))
    return up


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters with `requires_grad`, by name; a tied one appears once."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def optimizers(module: nn.Module, settings: TrainSettings) -> list[torch.optim.Optimizer]:
    """AdamW or RAdam over the trainable tensors of `module`; or Muon over its matrices and AdamW over the rest.

    Frozen tensors get no state. Tensors of one dimension (biases, gains) are not decayed. Muon's matrices are those of
    linear layers; its updates are scaled to the root mean square of AdamW's, so that one learning rate serves both.
    """
    parameters = trainable(module)
    linear = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)}
    matrices = [p for p in parameters.values() if settings.optimizer == "muon" and id(p) in linear]
    taken = {id(p) for p in matrices}
    rest = [p for p in parameters.values() if id(p) not in taken]
    made: list[torch.optim.Optimizer] = []
    if matrices:
        made.append(
            torch.optim.Muon(
                matrices, lr=settings.lr, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    if rest:
        groups = [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [g for g in groups if g["params"]]
        if settings.optimizer == "radam":
            made.append(torch.optim.RAdam(groups, settings.lr, settings.betas, decoupled_weight_decay=True))
        else:
            fused = all(p.device.type in FUSED for p in rest)
            made.append(torch.optim.AdamW(groups, settings.lr, settings.betas, fused=fused))
    return made


def set_rate(opts: list[torch.optim.Optimizer], lr: float) -> None:
    """Set the learning rate of every group."""
    for opt in opts:
        for group in opt.param_groups:
            group["lr"] = lr


def restore(opt: torch.optim.Optimizer, stored: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
    """Give `opt` the state that it had when it was saved: tensors by slot (`exp_avg`, `step`, ...) of each parameter.

    `load_state_dict` puts each slot where the optimizer creates it: most beside their parameter, but `step` on the CPU
    unless the update is fused. RAdam reads `step` once per parameter and update, which on a GPU waits for the device.
    """
    parameters = [p for group in opt.param_groups for p in group["params"]]
    states = {i: {slot: _like(p, t) for slot, t in stored.get(p, {}).items()} for i, p in enumerate(parameters)}
    opt.load_state_dict(
        {"state": {i: s for i, s in states.items() if s}, "param_groups": opt.state_dict()["param_groups"]}
    )


def _like(p: nn.Parameter, stored: Tensor) -> Tensor:
    """A copy on the CPU in the parameter's memory layout; safetensors stores all tensors contiguously."""
    if stored.shape != p.shape or type(stored) is not Tensor:  # a part of a sharded tensor is laid out as its own
        return stored.clone()
    layout = torch.empty_like(p, dtype=stored.dtype, device="cpu", memory_format=torch.preserve_format)
    return layout.copy_(stored)
