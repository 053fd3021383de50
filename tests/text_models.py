"""Tiny text encoders with random weights, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

TEXTS = [
    "a red circle above two blue stars",
    "green",
    "three small yellow squares on a dark background",
    "a red circle",
    "",
    "two blue stars below a circle , and far more words than sixteen tokens can ever hold at once",
]
_WORDS = sorted({word for text in TEXTS for word in text.split()})


def save_tokenizer(folder: Path, start: bool, specials: bool = True) -> int:
    """A word-level tokenizer with an end token, and a start token if asked; returns the size of its vocabulary."""
    names = ["<pad>", "</s>", "<unk>", *_WORDS, "<s>", "<e>"]  # CLIP finds the end as the largest id
    vocabulary = {word: i for i, word in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    end = "<e>" if start else "</s>"
    if specials:
        tokenizer.post_processor = TemplateProcessing(
            single=f"<s> $A {end}" if start else f"$A {end}",
            special_tokens=[(word, vocabulary[word]) for word in ("<s>", end)],
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=end if start else "<pad>", eos_token=end, unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return len(names)


def save_t5(folder: Path, kind: str = "T5", whole: bool = False, specials: bool = True, shard: str = "1GB") -> Any:
    """Save a T5, MT5 or UMT5 of width 16, the whole model or its encoder; returns the encoder, in eval mode."""
    torch.manual_seed(1)
    config_class = getattr(transformers, f"{kind}Config")
    config = config_class(
        vocab_size=save_tokenizer(folder, start=False, specials=specials),
        d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=1, num_heads=2,
    )  # fmt: skip
    encoder = getattr(transformers, f"{kind}EncoderModel")(config)
    if whole:
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
        encoder.encoder.load_state_dict(model.encoder.state_dict())
        model.save_pretrained(folder, max_shard_size=shard)
    else:
        encoder.save_pretrained(folder, max_shard_size=shard)
    return encoder.eval()


def save_clip(folder: Path, whole: bool = False) -> Any:
    """Save a CLIP text model of width 16 that reads 20 tokens, alone or in the whole CLIP; returns the text model."""
    torch.manual_seed(1)
    size = save_tokenizer(folder, start=True)
    text = dict(
        vocab_size=size, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=20, bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1,
    )  # fmt: skip
    if not whole:
        model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**text))
        model.save_pretrained(folder)
        return model.eval()
    vision = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    clip.save_pretrained(folder)
    return clip.text_model.eval()
