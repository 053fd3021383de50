"""Text encoders against transformers' own padded batches, and the ways they fail."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pixelgrow.errors import UserError
from pixelgrow.text.encoders import LabelEncoder, TextEncoder, as_labels, load_encoder
from pixelgrow.text.spec import describe
from text_models import TEXTS, save_clip, save_t5


def padded_reference(folder: Path, model: Any, max_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, mask and CLIP's pooled vector (or the masked mean) of TEXTS, in one padded batch."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "right"
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
    with torch.no_grad():
        out = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    mask = batch["attention_mask"].bool()
    mean = (out.last_hidden_state * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    pooled = getattr(out, "pooler_output", None)
    return out.last_hidden_state, mask, mean if pooled is None else pooled


def check_against_reference(name: str, folder: Path, model: Any, max_tokens: int = 16) -> TextEncoder:
    encoder = load_encoder(name, max_tokens)
    assert isinstance(encoder, TextEncoder)
    cond = encoder.encode(TEXTS)
    for width, length in ((None, cond.tokens.shape[1]), (24, 24)):  # type: ignore[union-attr]
        at_once = encoder.together(TEXTS, width)
        assert at_once.tokens is not None and at_once.mask is not None and at_once.tokens.shape[1] == length
        assert not at_once.tokens[~at_once.mask].any()
        torch.testing.assert_close(at_once.tokens[at_once.mask], cond.tokens[cond.mask], rtol=1e-4, atol=1e-5)  # type: ignore[index]
        torch.testing.assert_close(at_once.pooled, cond.pooled, rtol=1e-4, atol=1e-5)
    tokens, mask, pooled = padded_reference(folder, model, max_tokens)
    assert cond.tokens is not None and cond.mask is not None and cond.pooled is not None
    length = tokens.shape[1]
    assert cond.tokens.shape == (len(TEXTS), -(-length // 8) * 8, encoder.dim)
    assert cond.pooled.shape == (len(TEXTS), encoder.pooled_dim)
    assert cond.tokens.dtype == cond.pooled.dtype == torch.float32
    assert not cond.null.any()
    assert torch.equal(cond.mask[:, :length], mask)
    assert not cond.mask[:, length:].any()
    assert not cond.tokens[~cond.mask].any()
    torch.testing.assert_close(cond.tokens[cond.mask], tokens[mask], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cond.pooled, pooled, rtol=1e-4, atol=1e-4)
    return encoder


def test_minilm_is_the_masked_mean_of_its_tokens() -> None:
    folder = describe("minilm").folder
    assert folder is not None
    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False)
    encoder = check_against_reference("minilm", folder, model, max_tokens=32)
    assert (encoder.dim, encoder.pooled_dim, encoder.max_tokens) == (384, 384, 32)


@pytest.mark.parametrize("kind", ["T5", "MT5", "UMT5"])
@pytest.mark.parametrize("whole", [False, True], ids=["encoder", "encoder-decoder"])
def test_t5(tmp_path: Path, kind: str, whole: bool) -> None:
    model = save_t5(tmp_path, kind, whole)
    check_against_reference(str(tmp_path), tmp_path, model)


@pytest.mark.parametrize("whole", [False, True], ids=["text", "both-towers"])
def test_clip(tmp_path: Path, whole: bool) -> None:
    model = save_clip(tmp_path, whole)
    check_against_reference(str(tmp_path), tmp_path, model)


def test_an_encoding_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    save_t5(tmp_path)
    encoder = load_encoder(str(tmp_path), 16)
    together, reverse = encoder.encode(TEXTS), encoder.encode(TEXTS[::-1])
    for i, text in enumerate(TEXTS):
        alone = encoder.encode([text])
        assert alone.pooled is not None and together.pooled is not None and reverse.pooled is not None
        torch.testing.assert_close(alone.pooled[0], together.pooled[i], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(reverse.pooled[len(TEXTS) - 1 - i], together.pooled[i], rtol=1e-5, atol=1e-6)


def test_encodings_can_be_trained_on(tmp_path: Path) -> None:
    save_t5(tmp_path)
    cond = load_encoder(str(tmp_path), 16).encode(TEXTS)
    layer = torch.nn.Linear(16, 1)
    assert cond.tokens is not None
    layer(cond.tokens).sum().backward()  # inference tensors would refuse
    assert layer.weight.grad is not None


def test_long_captions_are_cut_and_bad_unicode_is_taken(tmp_path: Path) -> None:
    save_t5(tmp_path)
    encoder = load_encoder(str(tmp_path), 5)
    cond = encoder.encode(["red " * 40, "caf\u00e9 \N{BLACK STAR}", "broken \udcff byte", ""])
    assert cond.mask is not None
    assert cond.mask.sum(1).tolist() == [5, 3, 4, 1]


def test_no_captions_at_all(tmp_path: Path) -> None:
    save_t5(tmp_path)
    cond = load_encoder(str(tmp_path), 5).encode([])
    assert len(cond) == 0
    assert cond.tokens is not None
    assert cond.tokens.shape == (0, 8, 16)


def test_class_labels() -> None:
    encoder = load_encoder("labels:10")
    assert isinstance(encoder, LabelEncoder)
    assert encoder.spec.classes == 10
    cond = encoder.encode(["3", "0", "9"])
    assert cond.tokens is None
    assert cond.labels is not None
    assert cond.labels.tolist() == [3, 0, 9]
    for bad in ("10", "-1", "cat", "1.0", "", "\N{SUPERSCRIPT TWO}"):
        with pytest.raises(UserError, match="from 0 to 9"):
            encoder.encode(["1", bad])


def test_class_names_are_labels_too() -> None:
    assert as_labels(["light", "0", "01"], ["dark", "light"], 2) == ["1", "0", "1"]
    assert as_labels(["e\u0301te\u0301"], ["hiver", "\xe9t\xe9"], 2) == ["1"]  # NFD, as some keyboards send it
    assert as_labels(["10", "2", "0"], ["0", "10", "2"], 3) == ["1", "2", "0"]
    with pytest.raises(UserError, match="class 'cat' is unknown: expected one of dark, light, or a number from 0 to 1"):
        as_labels(["dark", "cat"], ["dark", "light"], 2)
    with pytest.raises(UserError, match="class '2' is unknown: expected a number from 0 to 1"):
        as_labels(["2"], [], 2)


# What is imported


def test_describing_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from pixelgrow.text.spec import describe; s = describe('minilm'); assert s.dim == 384;"
        "assert not {'torch', 'transformers', 'sentence_transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_loading_minilm_does_not_import_sentence_transformers() -> None:
    load_encoder("minilm")
    assert "sentence_transformers" not in sys.modules
    assert "torchvision" not in sys.modules


# Mistakes: one line each


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _other_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "gpt2"}')


def _no_type(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _lacking(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[next(k for k in sorted(weights) if "encoder.block.0" in k)]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def _other_tokenizer(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"more{i}": 1000 + i for i in range(50)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def _setting(**values: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return damage


def _index(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text) and None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *((_index(text), "index.json is damaged") for text in ("{", "[]", '{"weight_map": 3}', "[" * 100_000)),
        (_index('{"weight_map": {"a": 3}}'), "index.json is damaged"),
        (_setting(model_type="clip", text_config=None), "text_config in .* is None"),
        (_setting(d_model=None), "d_model in its config.json is None"),
        (_setting(num_layers="two"), "cannot be loaded"),
        (_no_config, "config.json"),
        (_other_type, "type 'gpt2'"),
        (_no_type, "config.json"),
        (_pickled, "pickled weights are not read"),
        (_cut, "model.safetensors is cut off"),
        (_lacking, "lack 'encoder.block.0"),
        (_no_tokenizer, "no tokenizer"),
        (_other_tokenizer, "tokenizer .* has"),
    ],
)
def test_a_damaged_folder_is_one_line(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    save_t5(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_encoder(str(tmp_path), 16)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "max_tokens", "message"),
    [
        ("nobody/has-this", 16, "cannot be fetched"),
        ("./no/such/folder", 16, "not a folder here"),
        ("labels:0", 16, "labels:N"),
        ("labels:ten", 16, "labels:N"),
        ("minilm", 0, "at least 1"),
        ("minilm", 513, "at most 512"),
    ],
)
def test_a_wrong_name_is_one_line(name: str, max_tokens: int, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_encoder(name, max_tokens)
    assert "\n" not in str(caught.value)


def test_clip_reads_no_more_than_its_positions(tmp_path: Path) -> None:
    save_clip(tmp_path)
    with pytest.raises(UserError, match="at most 20"):
        load_encoder(str(tmp_path), 21)


def test_a_tokenizer_without_special_tokens_names_the_empty_caption(tmp_path: Path) -> None:
    save_t5(tmp_path, specials=False)
    encoder = load_encoder(str(tmp_path), 16)
    with pytest.raises(UserError, match="no token of ''"):
        encoder.encode(["red", ""])
