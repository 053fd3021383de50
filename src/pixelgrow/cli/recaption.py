"""The `data recaption` verb: a second caption for every image of a folder, by an image-to-text model."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pixelgrow.data.images import BadImage
from pixelgrow.data.sources.base import Wording, wordings_of
from pixelgrow.data.sources.folders import PairedFolder
from pixelgrow.data.sources.index import FileSource
from pixelgrow.data.sources.metadata import MetadataFolder
from pixelgrow.data.sources.opening import open_source
from pixelgrow.errors import UserError, out_of_memory
from pixelgrow.external import hub
from pixelgrow.training.log import Display
from pixelgrow.writing import going_on, writing

MAX_SIDE = 768  # pixels; larger images are scaled down before the model's own preprocessing
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recaption:
    """What to do.

    `source`: a folder of captioned images. `model`: an image-to-text model of transformers, a folder or a name on the
    hub. `out`: the file to write. `weight`: of the new captions; the others keep theirs. `tokens`: of a new caption, at
    most.
    """

    source: str
    model: str
    out: Path
    prompt: str | None = None
    weight: float = 1.0
    batch: int = 8
    tokens: int = 64


def recaption(request: Recaption) -> str:
    """Write a metadata.jsonl with the captions of a folder and a new one for each image; returns a line for people.

    New captions are first kept in a hidden file beside it, so a call that was interrupted goes on when it is repeated.
    The metadata.jsonl itself is written whole or not at all. Raises UserError.
    """
    source = open_source(request.source)
    if not isinstance(source, MetadataFolder | PairedFolder):
        kind = getattr(source, "kind", "scenes")
        raise UserError(
            f"{request.source}: got {kind}, expected a folder with a metadata.jsonl or a .txt beside each image"
        )
    if request.out.exists():
        raise UserError(f"-o {request.out}: the file exists already; name another, or delete it")
    captioner = Captioner(request.model, request.prompt, request.tokens)
    settings = {"source": source.fingerprint} | {k: getattr(request, k) for k in ("model", "prompt", "tokens")}
    part = request.out.with_name(f".{request.out.name}.part")
    with going_on(), writing(request.out):
        request.out.parent.mkdir(parents=True, exist_ok=True)
        captions, end = _done(part, settings)
        with part.open("r+b" if end else "wb") as file, Display(request.model, len(source), len(captions)) as display:
            file.truncate(end)
            file.seek(end)
            file.write(b"" if end else _line(settings))
            for start in range(len(captions), len(source), request.batch):
                images = [_image(source, i) for i in range(start, min(start + request.batch, len(source)))]
                new = iter(captioner([image for image in images if image is not None]))
                for image in images:
                    captions.append(None if image is None else next(new))
                    file.write(_line(captions[-1]))
                file.flush()
                display.update(len(captions))
        whole = request.out.with_name(f".{request.out.name}.whole")
        with whole.open("wb") as file:
            for i, caption in enumerate(captions):
                file.write(_row(source, i, caption, request.weight))
        whole.replace(request.out)
        part.unlink()
    made = sum(bool(caption) for caption in captions)
    place = "" if source.kind in ("metadata.jsonl", PairedFolder.kind) else f" in the place of its {source.kind}"
    return (
        f"{made} of {len(captions)} images have a second caption: {request.out}, to be the metadata.jsonl of "
        f"{source.name}{place}"
    )


def _done(part: Path, settings: dict[str, Any]) -> tuple[list[str | None], int]:
    """The captions of an interrupted call with the same `settings`, and the byte where its last whole line ends."""
    if not part.exists():
        return [], 0
    lines = [line for line in part.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    if not lines or lines[0] != _line(settings):
        return [], 0
    return [json.loads(line) for line in lines[1:]], sum(map(len, lines))


def _line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _row(source: FileSource, i: int, caption: str | None, weight: float) -> bytes:
    """A line of metadata.jsonl: the captions of sample i, then the new one if there is any."""
    wordings = [*wordings_of(source, i), *([Wording(caption, weight)] if caption else [])]
    texts = [w.text if w.weight == 1 else {"text": w.text, "weight": w.weight} for w in wordings]
    return _line({"file_name": source.key(i), "text": texts if len(texts) > 1 else texts[0]})


def _image(source: FileSource, i: int) -> Image.Image | None:
    """A whole image, scaled down to `MAX_SIDE` if it is larger; None if it cannot be decoded."""
    h, w = source.size(i)
    scale = min(1.0, MAX_SIDE / max(h, w))
    try:
        return Image.fromarray(source.image(i, (max(1, round(h * scale)), max(1, round(w * scale)))))
    except BadImage as bad:
        logger.warning("%s: %s: %s", source.name, source.key(i), bad.reason)
        return None


class Captioner:
    """`captioner(images) -> captions`, by greedy decoding.

    The model is one of transformers' AutoModelForImageTextToText, or a VisionEncoderDecoder. `prompt`: for models that
    take text beside the image. `tokens`: of a caption, at most.
    """

    def __init__(self, name: str, prompt: str | None = None, tokens: int = 64) -> None:
        """Raises UserError if the model cannot be loaded or is no image-to-text model."""
        import transformers as hf

        self.tokens = tokens
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._load(hf, name)
        if prompt is not None and self.processor is None:
            raise UserError(f"--prompt: {name} is an image encoder with a text decoder, which takes none; drop it")
        self.prompt = self._prompted(prompt)

    def _load(self, hf: Any, name: str) -> None:
        folder, label = hub.find("image-to-text model", name), f"image-to-text model {name!r}"
        with hub.loading(label, folder):
            config = hf.AutoConfig.from_pretrained(folder, local_files_only=True)
        pair = config.model_type == "vision-encoder-decoder"
        kind = hf.VisionEncoderDecoderModel if pair else hf.AutoModelForImageTextToText
        self.model = hub.pretrained(label, folder, kind, unused="pooler").to(self.device).eval()
        with hub.loading(label, folder):
            self.processor: Any = None  # of text and image, for a model that takes both
            if pair:
                self.prepare: Any = hf.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
                self.tokenizer: Any = hf.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            else:
                self.processor = hf.AutoProcessor.from_pretrained(folder, local_files_only=True)
                self.prepare, self.tokenizer = self.processor, self.processor.tokenizer

    def _prompted(self, prompt: str | None) -> str | None:
        """The prompt in the chat format of the model, if it has one."""
        if self.processor is None or not getattr(self.processor, "chat_template", None):
            return prompt
        content = [{"type": "image"}, {"type": "text", "text": prompt or "Describe the image in one sentence."}]
        chat = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(chat, add_generation_prompt=True))

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        if not images:
            return []
        text: dict[str, Any] = {}
        if self.prompt is not None:
            text = {"text": [self.prompt] * len(images), "padding": True}
            self.tokenizer.padding_side = "left"  # the caption follows the prompt directly
        try:
            inputs = self.prepare(images=list(images), return_tensors="pt", **text).to(self.device)
            ids = self.model.generate(**inputs, max_new_tokens=self.tokens, do_sample=False, num_beams=1)
        except (ValueError, TypeError, IndexError, RuntimeError) as error:  # models differ in what they raise
            if out_of_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"the model cannot caption {len(images)} images ({reason}): try --batch 1, fewer --tokens, or another "
                "--prompt (some models need one, some take none)"
            ) from error
        prompted = inputs.get("input_ids")
        if prompted is not None and torch.equal(ids[:, : prompted.shape[1]], prompted):
            ids = ids[:, prompted.shape[1] :]  # a decoder-only model repeats the prompt
        return [" ".join(one.split()) for one in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
