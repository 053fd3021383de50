"""A compiled generator: the same gradients, and one backward pass of each compiled part in a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from diffusion.test_generator import generator, grown
from onestep.test_distill import Conditions, batch
from pixelgrow.onestep.distill import GENERATOR, DistillObjective
from pixelgrow.onestep.features import TeacherFeatures
from pixelgrow.onestep.settings import LossSettings
from test_growth import shallow


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at what enters a part
def test_each_compiled_part_goes_back_once_in_a_step() -> None:
    net, _ = grown(generator(), 32, "preserve")
    objective = DistillObjective(net, TeacherFeatures(shallow()), Conditions(), LossSettings(), seed=0)
    some = batch(2, 32)
    objective.discriminator.eval()  # spectral norms would move between the two steps
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)

    def step() -> tuple[dict[str, torch.Tensor], float]:
        net.zero_grad()
        terms = objective.loss(some, GENERATOR)
        during = sum(passes)
        terms.loss.backward()
        assert during == 0  # lambda needs gradients in the output layer alone, which is not compiled
        grads = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
        return grads, float(terms.logs["adv_weight"])

    passes: list[int] = []  # of each compiled part

    def counting(graph: Any, _: Any) -> Any:
        number = len(passes)
        passes.append(0)

        def run(*args: Any) -> Any:
            passes[number] += 1
            return graph(*args)

        return make_boxed_func(run)

    plain, weight = step()
    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=counting)
    net.compile(backend=backend, dynamic=False)
    compiled, again = step()
    assert len(passes) > 2 and set(passes) == {1}
    assert again == weight and 0.01 < weight < 10
    assert compiled.keys() == plain.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(compiled[name], grad, rtol=1e-5, atol=1e-7)
