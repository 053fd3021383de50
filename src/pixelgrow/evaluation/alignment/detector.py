"""Object detectors of transformers: of a list of kinds (DETR, YOLOS), or of any noun (OWL-ViT, Grounding DINO)."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixelgrow.errors import UserError
from pixelgrow.evaluation.alignment.questions import Question
from pixelgrow.evaluation.alignment.vqa import class_named
from pixelgrow.external import hub
from pixelgrow.pictures import to_pil

OVERLAP = 0.5  # of two boxes, intersection over union, above which they are one object. Ours
_SETTINGS = (
    *("config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer_config.json"),
)


class Detector:
    """A detector with a threshold of confidence. zero_shot: whether it looks for any noun."""

    def __init__(self, about: dict[str, Any], model: Any, processor: Any, zero_shot: bool) -> None:
        self.name, self.about, self.model, self.processor = str(about["name"]), about, model, processor
        self.zero_shot, self.threshold = zero_shot, float(about["threshold"])
        self.labels = {} if zero_shot else {str(word).lower(): i for i, word in model.config.id2label.items()}

    def describe(self) -> dict[str, Any]:
        """JSON: name, fingerprint, class, thresholds."""
        return dict(self.about)

    def check(self, questions: Iterable[Question]) -> None:
        """Raise UserError if a question has no noun to be counted, or a noun that the detector does not know."""
        asked = list(questions)
        if without := next((q for q in asked if not q.noun), None):
            raise UserError(
                f"detector {self.name!r}: {without.text!r} counts nothing, expected questions of form gecko; use a "
                "VQA model"
            )
        unknown = dict.fromkeys(q.noun for q in asked if not self.zero_shot and q.noun.lower() not in self.labels)
        if unknown:
            raise UserError(
                f"detector {self.name!r} does not know {next(iter(unknown))!r} and {len(unknown) - 1} more; expected "
                f"nouns among its {len(self.labels)}; choose a detector for any noun (OWL-ViT, Grounding DINO), or a "
                "VQA model"
            )

    def count(self, image: Tensor, question: Question) -> int:
        """How many objects of the question's noun are in the image, uint8 (3, h, w)."""
        self.check([question])
        return len(self.boxes(image, question.noun))

    @torch.no_grad()
    def boxes(self, image: Tensor, noun: str) -> Tensor:
        """The boxes (N, 4) of a noun's objects, as (left, top, right, bottom) in pixels; the most confident first.

        A detector for any noun gives several boxes of one object; of those that overlap, the most confident is kept.
        The others are trained to give one box an object, so all of theirs are kept.
        """
        picture, kept = to_pil(image), {"threshold": self.threshold, "target_sizes": [tuple(image.shape[-2:])]}
        if not self.zero_shot:
            inputs = self.processor(images=[picture], return_tensors="pt").to(self.model.device, self.model.dtype)
            found = self.processor.post_process_object_detection(self.model(**inputs), **kept)[0]
            mine = found["labels"] == self.labels[noun.lower()]
            return _sorted(found["boxes"][mine], found["scores"][mine])
        article = "an" if noun[0].lower() in "aeiou" else "a"
        owl = self.model.config.model_type.startswith("owl")  # trained with CLIP's prompts
        text = [[f"a photo of {article} {noun}" if owl else f"{article} {noun}"]]
        inputs = self.processor(images=[picture], text=text, return_tensors="pt").to(
            self.model.device, self.model.dtype
        )
        found = self.processor.post_process_grounded_object_detection(self.model(**inputs), text_labels=text, **kept)[0]
        return _apart(_sorted(found["boxes"], found["scores"]))


def load_detector(name: str, device: torch.device | str = "cpu", threshold: float | None = None) -> Detector:
    """Load a detector by hub name or folder, in float32.

    threshold: of confidence; None: what transformers takes for this model. Raises UserError if it is not found, cannot
    be loaded, or is no detector.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    label, folder = f"detector {name!r}", hub.find("detector", name)
    if threshold is not None and not 0 < threshold < 1:
        raise UserError(f"{label}: got threshold {threshold:g}, expected a number between 0 and 1; correct it")
    closed = auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES.values()
    anything = auto.MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES.values()
    model_class = class_named(label, folder, {*closed, *anything}, "an object detector")
    zero_shot = model_class.__name__ in anything
    fingerprint = hub.fingerprint(label, folder, _SETTINGS, "pixelgrow detector 1")
    model = hub.pretrained(label, folder, model_class).to(device).eval().requires_grad_(False)
    loader: Any = transformers.AutoProcessor if zero_shot else transformers.AutoImageProcessor
    processor = _processor(label, folder, loader)
    if threshold is None:
        threshold = _default(processor, zero_shot)
    about = {
        "name": name, "fingerprint": fingerprint, "class": model_class.__name__, "threshold": threshold,
        "overlap": OVERLAP if zero_shot else None,
    }  # fmt: skip
    return Detector(about, model, processor, zero_shot)


def _processor(label: str, folder: Path, loader: Any) -> Any:
    with hub.loading(label, folder):
        return loader.from_pretrained(folder, local_files_only=True)


def _default(processor: Any, zero_shot: bool) -> float:
    """The threshold that transformers takes for a model."""
    post = processor.post_process_grounded_object_detection if zero_shot else processor.post_process_object_detection
    return float(inspect.signature(post).parameters["threshold"].default)


def _sorted(boxes: Tensor, scores: Tensor) -> Tensor:
    return boxes[scores.argsort(descending=True, stable=True)].float().cpu()


def _apart(boxes: Tensor) -> Tensor:
    """Without the boxes (N, 4) that overlap with an earlier one that is kept."""
    sizes = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    common = (high - low).clamp(min=0).prod(-1)
    overlap = common / (sizes[:, None] + sizes[None] - common).clamp(min=1e-9)
    kept: list[int] = []
    for i in range(len(boxes)):
        if not kept or float(overlap[i, kept].max()) <= OVERLAP:
            kept.append(i)
    return boxes[kept]
