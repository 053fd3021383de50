"""Sharded tensors on the disk: each process writes its parts, and reads those that it needs.

The files and their reader are those of torch's distributed checkpoints (DCP): safetensors files that say where in the
whole tensors their parts begin. So any number of processes reads what any other number wrote.

DCP's writing is left out (torch 2.13.0). `HuggingFaceStorageWriter` makes one string of a file before it writes it.
That takes memory for a second copy, and locks the interpreter (1 s for 400 MiB), so that steps beside it stand still.
And DCP's processes exchange plans for each save (reading them takes 16 s at 64 processes and 5,000 tensors), while who
writes what follows from the layout.

torch's parts for this take seconds to import, so they are imported late.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pixelgrow.distributed.team import Team

# Names in the header of a file (torch.distributed.checkpoint._hf_utils).
_INFO, _BEGIN, _VERSION = "DCP_SHARDING_INFO", "saved_offsets", "DCP_VERSION"


def share(tensors: Mapping[str, Tensor], team: Team) -> dict[str, list[int]]:
    """Whose parts this process writes: names of tensors, and where its part of each begins in the whole.

    What several processes have alike is written by one of them; each writes about as much. All have the same names.
    """
    from torch.distributed.tensor import DTensor

    found = {}
    # By size, so that those who take turns get as many large ones.
    for number, name in enumerate(sorted(tensors, key=lambda n: (-tensors[n].numel(), n))):
        t = tensors[name]
        copies, mine, begin = team.size, team.rank, [0] * t.dim()
        if isinstance(t, DTensor):
            if not t.to_local().numel():
                continue
            place = t.device_mesh.get_coordinate()
            assert place is not None
            copies, mine = (t.device_mesh.size(0), place[0]) if t.device_mesh.ndim == 2 else (1, 0)
            begin = list(t.__create_chunk_list__()[0].offsets)
        if number % copies == mine:
            found[name] = begin
    return found


def header(begins: Mapping[str, list[int]]) -> dict[str, str]:
    """The metadata of a file with the parts that begin there in the whole tensors."""
    return {_INFO: json.dumps({n: {_BEGIN: begin} for n, begin in begins.items()}), _VERSION: "1.0", "format": "pt"}


def local(t: Tensor) -> Tensor:
    """The part of a sharded tensor that this process has; any other tensor itself."""
    from torch.distributed.tensor import DTensor

    return t.to_local() if isinstance(t, DTensor) else t


def stored(folder: Path) -> dict[str, Tensor]:
    """The whole tensors whose parts are in the safetensors files of a folder: their shapes and types alone (meta)."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    tensors = {n: of for n, of in found.items() if isinstance(of, TensorStorageMetadata)}
    return {n: torch.empty(of.size, dtype=of.properties.dtype, device="meta") for n, of in tensors.items()}


@torch.no_grad()
def fill(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read tensors by name from the safetensors files of a folder; of sharded ones, the parts that this process has."""
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(str(folder))
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    metadata = reader.read_metadata()
    planner.set_up_planner(dict(tensors), metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    reader.read_data(planner.create_local_plan(), planner).wait()
