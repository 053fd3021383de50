"""Tiny models with random weights that answer questions about images or find objects in them, for tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from pixelgrow.evaluation.alignment.questions import Question

SIDE = 32  # px, of the images that the models read
_COUNTS = ["one", "two", "three", "four", "1", "2", "3", "4"]
_WORDS = [
    *("yes", "Yes", "no", "No", "maybe", *_COUNTS, "ele", "##ven"),
    *("is", "there", "a", "dog", "cat", "in", "the", "image", "how", "many", "dogs", "are", "of", "photo", "an"),
    *("?", ".", ":", "question", "answer", "Question", "Answer", "one", "word", "user", "assistant"),
]
ANSWERS = ["yes", "no", "one", "2", "two", "3", "dog"]  # of ViLT
IMAGES = {"do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
CHAT = (
    "{% for message in messages %}user : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} assistant :{% endif %}"
)


class Answers:
    """A VQA model that answers as it is told."""

    name = "told"

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given

    def describe(self) -> dict[str, Any]:
        return {}

    def check(self, questions: Iterable[Question]) -> None: ...

    def probability(self, image: Tensor, question: Question) -> float:
        return float(self.given[question.id])

    def answer(self, image: Tensor, question: Question) -> str:
        return str(self.given[question.id])


def save_question_model(folder: Path, kind: str) -> Any:
    """Save a tiny `vilt`, `blip`, `llava` (with a chat template) or `git` (without), with its processor; the model.

    Their words are few, and "eleven" is two tokens, so that answers of several tokens are met.
    """
    torch.manual_seed(3)
    model, processor = {"vilt": _vilt, "blip": _blip, "llava": _llava, "git": _git}[kind]()
    for p in model.parameters():  # answers that are nearly equally likely would hide mistakes
        p.data.mul_(4 if p.ndim > 1 else 1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.eval()


def save_detector(folder: Path, kind: str) -> Any:
    """Save a tiny `yolos` (its kinds: dog, cat, fish), `owlvit` or `grounding`, with its processor; the model."""
    torch.manual_seed(5)
    model, processor = {"yolos": _yolos, "owlvit": _owlvit, "grounding": _grounding}[kind]()
    for name, p in model.named_parameters():  # so that boxes and kinds differ
        if p.ndim > 1:
            p.data.normal_(0, 3 if "tokens" in name or "query" in name else 0.4)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.eval()


def image_of(seed: int, size: tuple[int, int] = (40, 48)) -> Tensor:
    """A random image, uint8 (3, h, w)."""
    return torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def _bert(specials: tuple[str, ...] = ()) -> Any:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *specials, *dict.fromkeys(w.lower() for w in _WORDS)]
    vocabulary = {word: i for i, word in enumerate(names)}
    return transformers.BertTokenizer(vocab=vocabulary, do_lower_case=True)


def _words(*specials: str) -> Any:
    """A tokenizer that keeps capitals, with a start and an end."""
    names = ["<pad>", "<unk>", "<s>", "</s>", *specials, *dict.fromkeys(_WORDS)]
    vocabulary = {word: i for i, word in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens=list(specials), model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def _vilt() -> tuple[Any, Any]:
    tokenizer = _bert()
    config = transformers.ViltConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=10, image_size=SIDE, patch_size=8, id2label=dict(enumerate(ANSWERS)),
        label2id={a: i for i, a in enumerate(ANSWERS)},
    )  # fmt: skip
    images = transformers.ViltImageProcessorPil(size={"shortest_edge": SIDE}, size_divisor=8, **IMAGES)
    return transformers.ViltForQuestionAnswering(config), transformers.ViltProcessor(images, tokenizer)


def _blip() -> tuple[Any, Any]:
    tokenizer = _bert()
    small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    ids = dict(
        bos_token_id=tokenizer.cls_token_id, sep_token_id=tokenizer.sep_token_id, eos_token_id=tokenizer.sep_token_id
    )
    text = small | ids | dict(
        vocab_size=len(tokenizer), encoder_hidden_size=16, max_position_embeddings=32, projection_dim=8, pad_token_id=0
    )  # fmt: skip
    vision = small | dict(image_size=SIDE, patch_size=8)
    config = transformers.BlipConfig(text_config=text, vision_config=vision, projection_dim=8)
    images = transformers.BlipImageProcessorPil(size={"height": SIDE, "width": SIDE}, **IMAGES)
    return transformers.BlipForQuestionAnswering(config), transformers.BlipProcessor(images, tokenizer)


def _llava() -> tuple[Any, Any]:
    tokenizer = _words("<image>")
    small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**small, image_size=SIDE, patch_size=16, projection_dim=8),
        text_config=transformers.LlamaConfig(
            **small, vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
            bos_token_id=2, eos_token_id=3,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=-1,
    )  # fmt: skip
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE, **IMAGES)
    processor = transformers.LlavaProcessor(
        images, tokenizer, patch_size=16, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config), processor


def _git() -> tuple[Any, Any]:
    tokenizer = _words()
    small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = transformers.GitConfig(
        **small, vision_config=small | dict(image_size=SIDE, patch_size=16), vocab_size=len(tokenizer),
        max_position_embeddings=64, bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE, **IMAGES)
    return transformers.GitForCausalLM(config), transformers.GitProcessor(images, tokenizer)


def _yolos() -> tuple[Any, Any]:
    kinds = ["dog", "cat", "fish"]
    config = transformers.YolosConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=[SIDE, SIDE],
        patch_size=8, num_detection_tokens=12, id2label=dict(enumerate(kinds)),
        label2id={k: i for i, k in enumerate(kinds)},
    )  # fmt: skip
    images = transformers.YolosImageProcessorPil(size={"height": SIDE, "width": SIDE}, **IMAGES)
    return transformers.YolosForObjectDetection(config), images


def _owlvit() -> tuple[Any, Any]:
    tokenizer = _words()
    small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = transformers.OwlViTConfig(
        text_config=small | dict(
            vocab_size=len(tokenizer), max_position_embeddings=16, bos_token_id=2, eos_token_id=3, pad_token_id=0
        ),
        vision_config=small | dict(image_size=SIDE, patch_size=8),
        projection_dim=16,
    )  # fmt: skip
    images = transformers.OwlViTImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_center_crop=False, **IMAGES)
    return transformers.OwlViTForObjectDetection(config), transformers.OwlViTProcessor(images, tokenizer)


def _grounding() -> tuple[Any, Any]:
    tokenizer = _bert()
    text = dict(
        model_type="bert", vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=32,
    )  # fmt: skip
    backbone = dict(
        model_type="swin", image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_indices=[2, 3, 4],
    )  # fmt: skip
    config = transformers.GroundingDinoConfig(
        backbone_config=backbone, text_config=text, d_model=32, encoder_layers=1, decoder_layers=2, num_queries=12,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_text_len=16,
        num_feature_levels=3,
    )  # fmt: skip
    images = transformers.GroundingDinoImageProcessorPil(size={"height": 64, "width": 64}, **IMAGES)
    return transformers.GroundingDinoForObjectDetection(config), transformers.GroundingDinoProcessor(images, tokenizer)
