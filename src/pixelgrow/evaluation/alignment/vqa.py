"""Models of transformers that answer questions about images: ViLT, BLIP, and all from image and text to text."""

from __future__ import annotations

import json
import logging
from collections.abc import Container, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pixelgrow.errors import UserError
from pixelgrow.evaluation.alignment.nouns import NUMBERS, number
from pixelgrow.evaluation.alignment.questions import Question
from pixelgrow.external import hub
from pixelgrow.pictures import to_pil

logger = logging.getLogger(__name__)
CHAT = "{question} Answer in one word."  # GenEval 2's (arXiv 2512.16853, released code)
PLAIN = "Question: {question} Answer:"  # BLIP-2's (arXiv 2301.12597), where a model has no chat template
LONGEST = 8  # tokens of an answer
_SETTINGS = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "vocab.txt", "tokenizer_config.json", "chat_template.jinja", "chat_template.json"),
)


class Vqa(Protocol):
    """A model that answers questions about an image, uint8 (3, h, w)."""

    name: str

    def describe(self) -> dict[str, Any]:
        """JSON: all that repeating an answer needs."""
        ...

    def check(self, questions: Iterable[Question]) -> None:
        """Raise UserError if the model has no words for an expected answer; call it before anything is sampled."""
        ...

    def probability(self, image: Tensor, question: Question) -> float:
        """The probability that the model gives to the expected answer."""
        ...

    def answer(self, image: Tensor, question: Question) -> str:
        """The model's answer, in lower case."""
        ...


def load_vqa(name: str, device: torch.device | str = "cpu", template: str = "") -> Vqa:
    """Load a VQA model by hub name or folder. On a GPU it keeps the precision of its file; on a CPU it is float32.

    template: how a model that writes text is asked, with {question} in it, for models that want their own form
    (PaliGemma: "answer en {question}"; LLaVA without a chat template: "USER: <image> {question} ASSISTANT:").
    Raises UserError if it is not found, cannot be loaded, or answers no questions about images.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    label, folder = f"VQA model {name!r}", hub.find("VQA model", name)
    lists = auto.MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    known = {n for names in lists for n in names.values() if isinstance(n, str)}
    model_class = class_named(
        label, folder, known, "one that answers questions about images (ViLT, BLIP, image-text-to-text)"
    )
    labels = model_class.__name__ == "ViltForQuestionAnswering"
    if template and ("{question}" not in template or labels):
        wanted = "no template, as it has a fixed list of answers" if labels else "{question} in it"
        raise UserError(f"{label}: got template {template!r}, expected {wanted}; correct the template")
    fingerprint = hub.fingerprint(label, folder, _SETTINGS, "pixelgrow vqa 1")
    dtype = "float32" if torch.device(device).type == "cpu" else "auto"
    model = hub.pretrained(label, folder, model_class, dtype=dtype).to(device).eval().requires_grad_(False)
    with hub.loading(label, folder):
        processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
    if not (hasattr(processor, "tokenizer") and hasattr(processor, "image_processor")):
        raise UserError(f"{label}: {folder} has no processor of images and text; save the model's processor into it")
    about = {"name": name, "fingerprint": fingerprint, "class": model_class.__name__, "dtype": str(model.dtype)}
    return Labels(about, model, processor) if labels else Writer(about, model, processor, template)


def class_named(label: str, folder: Path, known: Container[str], wanted: str) -> Any:
    """The class of transformers that a folder's weights are of, one of the `known`.

    Raises UserError if they are of another; `wanted` says of what kind they must be.
    """
    import transformers

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        named = str((config.get("architectures") or [""])[0])
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{label}: {folder}/config.json cannot be read ({type(error).__name__}); fetch it again"
        ) from error
    if named not in known or not hasattr(transformers, named):
        raise UserError(
            f"{label} is a {named or 'model whose config.json names no architecture'}, expected {wanted}; name another"
        )
    return getattr(transformers, named)


class _Model:
    """What both kinds share."""

    def __init__(self, about: dict[str, Any], model: Any, processor: Any) -> None:
        self.name, self.about, self.model, self.processor = str(about["name"]), about, model, processor

    def describe(self) -> dict[str, Any]:
        """JSON: name, fingerprint, class, precision, and how it is asked."""
        return dict(self.about)

    def _label(self) -> str:
        return f"VQA model {self.name!r}"


class Labels(_Model):
    """A classifier over a list of answers (ViLT, arXiv 2102.03334).

    It is trained with one logistic output an answer, so its probability is the logistic of the answer's logit, and
    answers do not sum to 1. A number is one answer, whether in digits or in words.
    """

    def __init__(self, about: dict[str, Any], model: Any, processor: Any) -> None:
        super().__init__(about, model, processor)
        self.labels = [str(model.config.id2label[i]).lower() for i in range(model.config.num_labels)]
        self._cut: set[str] = set()

    def check(self, questions: Iterable[Question]) -> None:
        """Raise UserError if an expected answer is not in the model's list."""
        absent = dict.fromkeys(q.answer for q in questions if not self._places(q.answer))
        if absent:
            raise UserError(
                f"{self._label()} cannot answer {next(iter(absent))!r} and {len(absent) - 1} more; expected answers "
                f"among its {len(self.labels)}; choose a model that writes its answers"
            )

    def probability(self, image: Tensor, question: Question) -> float:
        """The largest probability among the ways to write the expected answer."""
        self.check([question])
        return float(self._logits(image, question)[self._places(question.answer)].sigmoid().max())

    def answer(self, image: Tensor, question: Question) -> str:
        """The most probable answer of the list."""
        return self.labels[int(self._logits(image, question).argmax())]

    def _places(self, answer: str) -> list[int]:
        written = {text.strip().lower() for text in spellings(answer)}
        return [i for i, label in enumerate(self.labels) if label in written]

    @torch.no_grad()
    def _logits(self, image: Tensor, question: Question) -> Tensor:
        longest, text = self.model.config.max_position_embeddings, question.text
        if text not in self._cut and len(self.processor.tokenizer(text)["input_ids"]) > longest:
            logger.warning("%s reads %d tokens and not all of %r", self._label(), longest, text)
            self._cut.add(text)
        inputs = self.processor(
            images=[to_pil(image)], text=[text], truncation=True, max_length=longest, return_tensors="pt"
        )
        logits: Tensor = self.model(**inputs.to(self.model.device, self.model.dtype)).logits[0]
        return logits.float()


class Writer(_Model):
    """A model that writes its answer, token by token (BLIP, LLaVA, Qwen-VL, ...).

    The probability of an answer is that of the model's text beginning with it: the product of its tokens'
    probabilities, summed over the answer's `spellings`. Where each is one token, as with the model of GenEval 2, this
    is GenEval 2's.
    """

    def __init__(self, about: dict[str, Any], model: Any, processor: Any, template: str) -> None:
        super().__init__(about, model, processor)
        self.chat = not template and bool(getattr(processor, "chat_template", None))
        asks_plainly = type(model).__name__ == "BlipForQuestionAnswering"  # it reads nothing but the question
        self.template = template or ("{question}" if asks_plainly else CHAT if self.chat else PLAIN)
        self.about |= {"template": self.template, "chat": self.chat}
        self._tokens = cache(self._tokens_of)

    def check(self, questions: Iterable[Question]) -> None:
        """Raise UserError if the tokenizer has no tokens for an expected answer."""
        for answer in dict.fromkeys(q.answer for q in questions):
            if not self._tokens(answer):
                raise UserError(
                    f"{self._label()} cannot answer {answer!r}: its tokenizer has no token for it; choose another model"
                )

    def probability(self, image: Tensor, question: Question) -> float:
        """The probability that the model's text begins with the expected answer."""
        self.check([question])
        inputs, total = self._inputs(image, question), 0.0
        first = self._generate(inputs, 1).logits[0][0].float().softmax(-1)
        for tokens in self._tokens(question.answer):
            if len(tokens) == 1:
                total += float(first[tokens[0]])
            else:
                steps = self._generate(inputs, len(tokens), tokens).logits
                total += float(sum(s[0].float().log_softmax(-1)[t] for s, t in zip(steps, tokens, strict=True)).exp())
        return min(total, 1.0)

    def answer(self, image: Tensor, question: Question) -> str:
        """The most probable next tokens, one by one, as text without punctuation at its ends."""
        out = self._generate(self._inputs(image, question), LONGEST)
        written = out.sequences[0, -len(out.logits) :]
        return str(self.processor.tokenizer.decode(written, skip_special_tokens=True)).strip(" \t\n.,!?\"'*").lower()

    def _tokens_of(self, answer: str) -> list[tuple[int, ...]]:
        """The token sequences that write an answer; none begins another, as its probability is in the shorter one's."""
        tokenizer = self.processor.tokenizer
        found = {tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in spellings(answer)}
        known = sorted((t for t in found if t and tokenizer.unk_token_id not in t), key=lambda t: (len(t), t))
        return [t for i, t in enumerate(known) if not any(t[: len(s)] == s for s in known[:i])]

    def _inputs(self, image: Tensor, question: Question) -> Any:
        picture, text = to_pil(image), self.template.replace("{question}", question.text)
        if self.chat:
            content = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
            inputs = self.processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            )  # fmt: skip
        else:
            inputs = self.processor(images=[picture], text=[text], return_tensors="pt")
        return inputs.to(self.model.device, self.model.dtype)

    @torch.no_grad()
    def _generate(self, inputs: Any, longest: int, forced: Sequence[int] = ()) -> Any:
        """The model's own generation, greedy or along `forced` tokens, with the logits of every step."""
        with hub.quiet():
            return self.model.generate(
                **inputs, max_new_tokens=longest, do_sample=False, num_beams=1, output_logits=True,
                return_dict_in_generate=True, logits_processor=[_Forced(forced)] if forced else [],
            )  # fmt: skip


class _Forced:
    """A logits processor: every step takes the next of the given tokens."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.left = list(tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        only = torch.full_like(scores, -torch.inf)
        only[:, self.left.pop(0)] = 0
        return only


def spellings(answer: str) -> list[str]:
    """The ways to write an answer: in small letters or capitalised, a number in digits too, with a space before or not.

    They are GenEval 2's (arXiv 2512.16853, released code).
    """
    written = [answer.strip().lower()]
    count = number(answer) if written[0].isdecimal() or written[0] in NUMBERS else None
    if count is not None and count < len(NUMBERS):
        written = [NUMBERS[count], str(count)]
    return list(dict.fromkeys(space + text for w in written for text in (w, w.capitalize()) for space in ("", " ")))
