"""Files that cannot be written: one line, and how to go on where something goes on. Faults of weight files."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from pixelgrow import checkpoint
from pixelgrow.errors import UserError
from pixelgrow.external.autoencoder import Autoencoder
from pixelgrow.external.vision import describe as describe_vision
from pixelgrow.onestep.pairs import shard_fault, write_shard
from pixelgrow.text.spec import describe as describe_text
from pixelgrow.writing import CannotWrite, fault_of, going_on, writing
from text_models import save_t5

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
IS_POINTER = "is a Git LFS pointer, not the weights: run git lfs pull"


def test_what_is_wrong_with_weights_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    assert fault_of(path) == "is missing: copy it again"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.float16)}, path, metadata={"format": "pt"})
    assert fault_of(path) == ""
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    for content, words in (
        (POINTER, IS_POINTER),
        (b"", "is empty: fetch it"),
        (whole[:-1], f"is cut off ({len(whole) - 1} of {len(whole)} bytes): fetch it"),
        (whole[: 8 + length], f"is cut off ({8 + length} of {len(whole)} bytes): fetch it"),
        (whole[: 7 + length], f"is cut off (its header alone is longer than its {7 + length} bytes): fetch it"),
        (whole[:9], "is cut off (its header alone is longer than its 9 bytes): fetch it"),
        (whole[:3], "is cut off (its header alone is longer than its 3 bytes): fetch it"),
        (whole + b"\n", f"is damaged ({len(whole) + 1} bytes instead of {len(whole)}): fetch it"),
        (whole[:12] + b"\xff\xff" + whole[14:], "is damaged (its header cannot be read): fetch it"),
        (b"PK\x03\x04 and more of an archive", "is a pickle or an archive, not safetensors: fetch it"),
        (b"\x80\x02}q\x00(X\x03\x00\x00\x00", "is a pickle, not safetensors: fetch it"),
        (b"<!DOCTYPE html><html>", "is a web page, not the weights: fetch it"),
        (b"anything else than that", "is no safetensors file: fetch it"),
    ):
        path.write_bytes(content)
        assert fault_of(path, "fetch it") == words


def test_every_loader_names_a_pointer(tmp_path: Path) -> None:
    text = tmp_path / "text"
    save_t5(text)
    for name, words in (("tokenizer.json", "tokenizer.json is a Git LFS pointer"), ("model.safetensors", IS_POINTER)):
        (text / name).write_bytes(POINTER)
        with pytest.raises(UserError, match=words):
            describe_text(str(text), 16)
    vision = tmp_path / "vision"
    vision.mkdir()
    (vision / "config.json").write_text('{"model_type": "vit"}', encoding="utf-8")
    processor = '{"size": 8, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}'
    (vision / "preprocessor_config.json").write_text(processor, encoding="utf-8")
    (vision / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(UserError, match=IS_POINTER):
        describe_vision(str(vision))
    latent = tmp_path / "latent"
    latent.mkdir()
    (latent / "config.json").write_text(
        '{"_class_name": "AutoencoderKL", "block_out_channels": [4], "latent_channels": 4}'
    )
    (latent / "diffusion_pytorch_model.safetensors").write_bytes(POINTER)
    with pytest.raises(UserError, match=IS_POINTER):
        Autoencoder(str(latent))
    (tmp_path / checkpoint.WEIGHTS).write_bytes(POINTER)
    with pytest.raises(UserError, match=IS_POINTER):
        checkpoint.read_tensors(tmp_path, "digest")
    shard = tmp_path / "00000.safetensors"
    write_shard(shard, {"a": torch.zeros(4)})
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"\x01")
    assert shard_fault(shard, "make it again") == "is damaged (its checksum is wrong): make it again"
    shard.write_bytes(POINTER)
    assert shard_fault(shard, "make it again") == IS_POINTER


def test_converted_weights_are_told_from_damaged_ones(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / checkpoint.WEIGHTS)
    digest = checkpoint.file_hash(tmp_path / checkpoint.WEIGHTS)
    assert checkpoint.read_tensors(tmp_path, digest)
    save_file({"a": torch.zeros(3).half()}, tmp_path / checkpoint.WEIGHTS)
    with pytest.raises(
        UserError, match=r'\(float16\) is damaged or was converted: .* write "sha256": "" into config.json'
    ):
        checkpoint.read_tensors(tmp_path, digest)
    assert checkpoint.read_tensors(tmp_path)["a"].dtype == torch.float16


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; make room there"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error; check the disk"),
        (OSError("odd"), "odd; check the disk"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "b"), r"No such file or directory .b.; it was"),
        (FileExistsError(errno.EEXIST, "File exists", "f"), "f is a file, not a folder; name another place"),
    ],
)
def test_any_failure_to_write_is_one_line(error: OSError, words: str) -> None:
    with pytest.raises(CannotWrite, match=f"^cannot write a: {words}") as caught, writing(Path("a")):
        raise error
    assert "saved" not in str(caught.value) and "again" not in str(caught.value)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EDQUOT, "make room there"),
        (errno.EPERM, "allow writing there"),
        (errno.EROFS, "allow writing there"),
        (errno.EISDIR, "; name another place"),
        (errno.ENAMETOOLONG, "; name another place"),
    ],
)
def test_the_remedy_is_that_of_the_error(number: int, remedy: str) -> None:
    for error in (OSError(number, "no"), SafetensorError(f"I/O error: no (os error {number})")):
        with pytest.raises(CannotWrite, match=f"cannot write .*{remedy}"), writing(Path("a")):
            raise error
    with pytest.raises(SafetensorError, match="shape"), writing(Path("a")):
        raise SafetensorError("shape")


def test_only_what_goes_on_says_how_to_go_on(tmp_path: Path) -> None:
    words = "make room there, then run the same command again: it goes on from what was saved"
    with pytest.raises(UserError, match=words), going_on(), writing(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(UserError, match=r"^other$"), going_on():
        raise UserError("other")
