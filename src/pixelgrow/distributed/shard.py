"""One copy of a network on several processes: FSDP2 shards its weights, averages and optimizer state.

Every S processes share one copy; N > S processes have N / S copies (HSDP). Each tensor is cut along its first axis. The
gradients are summed over all processes, as `Team.add_up` sums those of a network that every process has.

torch's parts for this take seconds to import, so they are imported late.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pixelgrow.distributed.team import ENDED, Lost, Team, connected

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule

M = TypeVar("M", bound=nn.Module)


def mesh_of(team: Team, shard: int, device: torch.device) -> DeviceMesh | None:
    """The mesh of the processes, of which `shard` neighbours share a copy; None if each has a copy of its own."""
    assert team.size % shard == 0
    if shard == 1:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    with connected():
        if shard == team.size:
            return init_device_mesh(device.type, (shard,), mesh_dim_names=("shard",))
        shape = (team.size // shard, shard)
        return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def split(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    last: Sequence[nn.Module],
    mesh: DeviceMesh,
    device: torch.device,
    dtype: torch.dtype,
    team: Team,
) -> Split:
    """A network and a sharded copy of it on `device`, with the first process's weights.

    blocks: submodules whose weights are whole while they compute, one at a time. last: submodules whose weights stay
    whole until the backward pass, as losses are differentiated in them. The rest of the weights stays so, too.
    dtype: of the weights while they are whole. Masters, gradients and their sums are float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    memo: dict[int, object] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    names = {id(module): name for name, module in model.named_modules()}
    made = copy.deepcopy(model, memo)
    # cast_forward_inputs would round noise levels and noisy images to `dtype`.
    policy = MixedPrecisionPolicy(
        None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for module in (*blocks, *last):
        free = all(module is not one for one in last)
        inner = made.get_submodule(names[id(module)])
        fully_shard(inner, mesh=mesh, mp_policy=policy, reshard_after_forward=free)
    fully_shard(made, mesh=mesh, mp_policy=policy)
    for group in _groups(made):  # gradients are added up, as those of a network that is not sharded
        group.set_force_sum_reduction_for_comms(True)
        group.set_gradient_divide_factor(1.0)
    made.to_empty(device=device)
    mine = _named(model)
    team.wait()
    with torch.no_grad(), connected():
        for name, t in _named(made).items():
            weights = mine[name].detach().to(device, copy=True)
            dist.broadcast(weights, 0)
            t.copy_(_part(weights, t))
    return Split(made, model, [made.get_submodule(names[id(module)]) for module in blocks], team, device)


def _groups(module: nn.Module) -> list[FSDPModule]:
    from torch.distributed.fsdp import FSDPModule

    return [m for m in module.modules() if isinstance(m, FSDPModule)]


def _named(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _part(stored: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this process has of `like`."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return stored
    return distribute_tensor(stored.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _whole(t: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    if not isinstance(t, DTensor):
        return t
    with connected():
        return t.full_tensor()


class Split:
    """A sharded network, and the whole of it in the first process: what hooks see and what is written.

    plain: the network that the sharded one is a copy of. It is on the CPU while nothing looks at it; in processes that
    are not the first it has no weights. blocks: the submodules of the sharded network that are whole one at a time.
    """

    def __init__(
        self, network: nn.Module, plain: nn.Module, blocks: list[nn.Module], team: Team, device: torch.device
    ) -> None:
        self.network, self.plain, self.blocks, self.team, self.device = network, plain, blocks, team, device
        self._park()

    def _park(self) -> None:
        self.plain.to("cpu" if self.team.first else "meta")

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy parameters and the network's buffers into the whole network. All processes call it."""
        into = _named(self.plain)
        self.team.wait()  # a GPU's group waits for minutes only
        for name, t in (*tensors.items(), *self.network.named_buffers()):
            one = _whole(t)
            if self.team.first:
                into[name].copy_(one)

    @contextmanager
    def holding(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Within, the whole network holds these parameters, by name, on the device. All processes enter."""
        self.take(tensors)
        if self.team.first:
            self.plain.to(self.device)
        try:
            yield
        finally:
            self._park()


@dataclass(frozen=True)
class Shards:
    """The parts of a training that are sharded, by name. If there are none, a whole tensor is its own part."""

    parts: Mapping[str, Split] = field(default_factory=dict)

    def __contains__(self, part: str) -> bool:
        return part in self.parts

    def __bool__(self) -> bool:
        return bool(self.parts)

    def network(self, part: str, plain: M) -> M:
        """The network that trains: the sharded copy of `plain`, or itself."""
        return cast(M, self.parts[part].network) if part in self.parts else plain

    def whole(self, t: Tensor) -> Tensor:
        """The whole of a sharded tensor, gathered by all processes together; any other tensor itself."""
        return _whole(t) if self else t

    def gathered(self, tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
        """Whole tensors by name, those that were sharded on the CPU; none in a process that does not `keep` them."""
        found = {}
        for part in self.parts.values():
            part.team.wait()
        for name, t in tensors.items():
            one = self.whole(t)
            if keep:
                found[name] = t if one is t else one.cpu()
        return found

    def room(self, stored: Tensor, like: Tensor) -> Tensor:
        """Memory for a stored tensor of this shape and type: sharded as `like` is, if it is of its shape."""
        if self and stored.shape == like.shape:
            return torch.empty_like(like, dtype=stored.dtype, requires_grad=False)
        return torch.empty_like(stored, device="cpu")

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """Around forward and backward passes, in which the processes exchange weights; raises Lost if one has ended.

        An error of this process's own ends the others in this way. Afterwards no whole weights are left.
        """
        try:
            yield
        except RuntimeError as error:
            if self and (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise Lost(ENDED) from error
            raise
        for part in self.parts.values():
            for group in _groups(part.network):  # a forward pass without a backward pass leaves some whole
                group.reshard()
