"""Reference statistics: what metrics need of real images, in one file that says which images and which extractor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pixelgrow.errors import UserError
from pixelgrow.evaluation.statistics import Moments
from pixelgrow.writing import atomic, fault_of, reading

_KEY = "pixelgrow reference"


@dataclass(frozen=True)
class Reference:
    """Statistics of real images.

    data        what says which images these are: fingerprint, number, size; JSON
    extractor   what says how their features were made (`Extractor.describe()`): weights, resizing, layer; JSON
    features    (n, width) fp32, where metrics of neighbours or kernels are asked for
    """

    moments: Moments
    data: dict[str, Any]
    extractor: dict[str, Any]
    features: Tensor | None = None


def save_reference(path: Path, reference: Reference) -> None:
    """Write one safetensors file, whole or not at all; data and extractor stand in its header as JSON.

    Raises UserError if it cannot be written.
    """
    tensors = {f"moments.{k}": v for k, v in reference.moments.to_arrays().items()}
    if reference.features is not None:
        tensors["features"] = reference.features.contiguous()
    header = {_KEY: json.dumps({"data": reference.data, "extractor": reference.extractor})}
    with atomic(path) as part:
        save_file(tensors, part, metadata=header)


def load_reference(
    path: Path, *, data: Mapping[str, Any] | None = None, extractor: Mapping[str, Any] | None = None
) -> Reference:
    """Read what `save_reference` wrote. Features are mapped from the file, not read.

    data, extractor     what the file must have been made of. Keys that are not named may be anything.

    Raises UserError if the file is missing, damaged or no reference, or was made of something else; it names what
    differs.
    """
    with reading(path):
        if not path.is_file():
            raise UserError(f"there is no reference {path}; make it from the real images, or name another")
    try:
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get(_KEY)
            tensors = {k: file.get_tensor(k) for k in file.keys()} if header else {}  # noqa: SIM118  no mapping
    except SafetensorError as error:
        raise UserError(f"reference {path} {fault_of(path, 'make it again')}") from error
    if header is None:
        raise UserError(f"{path} holds no reference statistics; make them from the real images, or name another file")
    made = json.loads(header)
    _same(path, "the images", made["data"], data or {})
    _same(path, "the extractor", made["extractor"], extractor or {})
    moments = Moments.from_arrays({k.removeprefix("moments."): v for k, v in tensors.items()})
    return Reference(moments, made["data"], made["extractor"], tensors.get("features"))


def _same(path: Path, what: str, got: dict[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise UserError, naming up to three differences, unless all that is wanted is got."""
    expected = json.loads(json.dumps(dict(wanted)))
    differing = [k for k, v in expected.items() if k not in got or got[k] != v]
    if differing:
        found = "; ".join(f"{k}: got {_short(got.get(k))}, expected {_short(expected[k])}" for k in differing[:3])
        raise UserError(
            f"reference {path} does not fit {what}: {found}; make it again, or name the reference that fits"
        )


def _short(value: Any) -> str:
    """A value in a message: hashes cut to 12 characters."""
    if isinstance(value, str):
        return value[:12] if len(value) > 24 and " " not in value else repr(value)
    return "none" if value is None else json.dumps(value)
