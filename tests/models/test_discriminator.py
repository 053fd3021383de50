"""The discriminator's heads against the formulas of projection (Miyato & Koyama) and of spectral norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pixelgrow.models.discriminator import Discriminator, Head


def normed(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """A linear layer with its weight over the largest singular value, worked out here."""
    weight = layer.parametrizations.weight.original
    return x @ (weight / torch.linalg.matrix_norm(weight, 2)).T + layer.bias


def scaled(model: torch.nn.Module) -> torch.nn.Module:
    """Layers whose singular values are all 3, which one power iteration finds; no more are made afterwards."""
    for m in model.modules():
        if hasattr(m, "parametrizations"):
            torch.nn.init.orthogonal_(m.parametrizations.weight.original, gain=3)
            _ = m.weight
    return model.eval()


def test_a_head_is_a_projection_discriminator_of_unit_spectral_norms() -> None:
    """arXiv 1802.05637, eq. 3: logit = psi(phi(x)) + <V y, phi(x)>, here for every token, over sqrt(hidden)."""
    head = scaled(Head(6, 10, 16).double())
    tokens, vec = torch.randn(3, 5, 6).double(), torch.randn(3, 10).double()
    h = F.leaky_relu(normed(head.down, F.layer_norm(tokens, (6,))), 0.2)
    phi = F.leaky_relu(h + normed(head.mix, h), 0.2)  # (B, N, hidden)
    wanted = normed(head.cond, F.layer_norm(vec, (10,)))  # (B, hidden)
    want = normed(head.out, phi)[..., 0] + torch.einsum("bnc,bc->bn", phi, wanted) / 4
    torch.testing.assert_close(head(tokens, vec), want, rtol=1e-6, atol=1e-8)


def test_a_condition_and_a_guidance_weight_change_every_logit() -> None:
    made = Discriminator([6, 4], 10, hidden=8, guided=True).double().eval()
    features = [torch.randn(2, 3, 6).double(), torch.randn(2, 5, 4).double()]
    vec, omega = torch.randn(2, 10).double(), torch.tensor([2.0, 2.0]).double()
    torch.nn.init.normal_(made.guidance.out.weight)  # it starts at zero
    plain = made(features, vec, omega)
    assert [v.shape for v in plain] == [(2, 3), (2, 5)]
    for other in (made(features, vec.flip(0), omega), made(features, vec, torch.tensor([2.0, 9.0]).double())):
        for a, b in zip(plain, other, strict=True):
            assert (a[1] - b[1]).abs().min() > 1e-4
