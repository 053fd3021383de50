"""The `recaption` verb: a second caption for every picture of a folder, by an image-to-text model of transformers."""

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

MAX_SIDE = 768  # pixels; larger pictures are scaled down before the model's own preparation sees them
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recaption:
    """What is asked for. `weight`: of the new caption; those that were there keep theirs. `tokens`: at the most."""

    source: str
    model: str
    out: Path
    prompt: str | None = None
    weight: float = 1.0
    batch: int = 8
    tokens: int = 64


def recaption(ask: Recaption) -> str:
    """Write `ask.out`, a metadata.jsonl with a folder's captions and the model's beside them; returns a line about it.

    What is done is kept in a hidden file beside it: a call that was interrupted and is repeated goes on there. The file
    itself is written whole or not at all. Raises UserError.
    """
    source = open_source(ask.source)
    if not isinstance(source, MetadataFolder | PairedFolder):
        kind = getattr(source, "kind", "drawn scenes")
        raise UserError(
            f"{ask.source}: got {kind}, expected a folder with a metadata.jsonl or a .txt beside each image: those are "
            "given a second caption"
        )
    if ask.out.exists():
        raise UserError(f"-o {ask.out}: there is such a file already; name another, or delete it")
    captioner = Captioner(ask.model, ask.prompt, ask.tokens)
    told = {"source": source.fingerprint, "model": ask.model, "prompt": ask.prompt, "tokens": ask.tokens}
    part = ask.out.with_name(f".{ask.out.name}.part")
    with going_on(), writing(ask.out):
        ask.out.parent.mkdir(parents=True, exist_ok=True)
        said, end = _done(part, told)
        with part.open("r+b" if end else "wb") as file, Display(ask.model, len(source), len(said)) as display:
            file.truncate(end)
            file.seek(end)
            file.write(b"" if end else _line(told))
            for start in range(len(said), len(source), ask.batch):
                pictures = [_picture(source, i) for i in range(start, min(start + ask.batch, len(source)))]
                words = iter(captioner([p for p in pictures if p is not None]))
                for picture in pictures:
                    said.append(None if picture is None else next(words))
                    file.write(_line(said[-1]))
                file.flush()
                display.update(len(said))
        whole = ask.out.with_name(f".{ask.out.name}.whole")
        with whole.open("wb") as file:
            for i, words_of in enumerate(said):
                file.write(_row(source, i, words_of, ask.weight))
        whole.replace(ask.out)
        part.unlink()
    new = sum(bool(words_of) for words_of in said)
    place = "" if source.kind in ("metadata.jsonl", PairedFolder.kind) else f" in the place of its {source.kind}"
    return (
        f"{new} of {len(said)} images have a second caption: {ask.out}, to be the metadata.jsonl of "
        f"{source.name}{place}"
    )


def _done(part: Path, told: dict[str, Any]) -> tuple[list[str | None], int]:
    """What an interrupted call of the same model and pictures had said, and where its last whole line ends."""
    if not part.exists():
        return [], 0
    lines = [line for line in part.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    if not lines or lines[0] != _line(told):
        return [], 0
    return [json.loads(line) for line in lines[1:]], sum(map(len, lines))


def _line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _row(source: FileSource, i: int, words: str | None, weight: float) -> bytes:
    """A line of metadata.jsonl: the captions of sample i, and the model's after them if it said any."""
    wordings = [*wordings_of(source, i), *([Wording(words, weight)] if words else [])]
    texts = [w.text if w.weight == 1 else {"text": w.text, "weight": w.weight} for w in wordings]
    return _line({"file_name": source.key(i), "text": texts if len(texts) > 1 else texts[0]})


def _picture(source: FileSource, i: int) -> Image.Image | None:
    """A whole picture, scaled to `MAX_SIDE` at the most; None where it cannot be decoded."""
    h, w = source.size(i)
    scale = min(1.0, MAX_SIDE / max(h, w))
    try:
        return Image.fromarray(source.image(i, (max(1, round(h * scale)), max(1, round(w * scale)))))
    except BadImage as bad:
        logger.warning("%s: %s: %s", source.name, source.key(i), bad.reason)
        return None


class Captioner:
    """`captioner(pictures) -> texts`, greedily: a model that transformers' AutoModelForImageTextToText knows, or a
    VisionEncoderDecoder. `prompt`: what it is asked, for a model that takes words too."""

    def __init__(self, name: str, prompt: str | None = None, tokens: int = 64) -> None:
        """Raises UserError if the model cannot be had or is none that puts pictures into words."""
        import transformers as hf

        self.tokens = tokens
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._load(hf, name)
        if prompt is not None and self.both is None:
            raise UserError(f"--prompt: {name} is an image encoder with a text decoder, which takes none; drop it")
        self.prompt = self._asked(prompt)

    def _load(self, hf: Any, name: str) -> None:
        folder, label = hub.find("image-to-text model", name), f"image-to-text model {name!r}"
        with hub.loading(label, folder):
            config = hf.AutoConfig.from_pretrained(folder, local_files_only=True)
        pair = config.model_type == "vision-encoder-decoder"
        kind = hf.VisionEncoderDecoderModel if pair else hf.AutoModelForImageTextToText
        self.model = hub.pretrained(label, folder, kind, unused="pooler").to(self.device).eval()
        with hub.loading(label, folder):
            both: Any = None if pair else hf.AutoProcessor.from_pretrained(folder, local_files_only=True)
            image = hf.AutoImageProcessor.from_pretrained(folder, local_files_only=True) if pair else both
            words = hf.AutoTokenizer.from_pretrained(folder, local_files_only=True) if pair else both.tokenizer
        self.both = both
        self.images: Any = image
        self.words: Any = words

    def _asked(self, prompt: str | None) -> str | None:
        """The prompt in the form that a chat model was trained with."""
        if self.both is None or not getattr(self.both, "chat_template", None):
            return prompt
        content = [{"type": "image"}, {"type": "text", "text": prompt or "Describe the picture in one sentence."}]
        return str(self.both.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> list[str]:
        if not pictures:
            return []
        words: dict[str, Any] = {}
        if self.prompt is not None:
            words = {"text": [self.prompt] * len(pictures), "padding": True}
            self.words.padding_side = "left"  # what is said goes on where the prompt ends
        try:
            inputs = self.images(images=list(pictures), return_tensors="pt", **words).to(self.device)
            ids = self.model.generate(**inputs, max_new_tokens=self.tokens, do_sample=False, num_beams=1)
        except (ValueError, TypeError, IndexError, RuntimeError) as error:  # as each model likes
            if out_of_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"the model cannot put {len(pictures)} pictures into words ({reason}): try --batch 1, fewer "
                "--tokens, or another --prompt (some models need one, some take none)"
            ) from error
        asked = inputs.get("input_ids")
        if asked is not None and torch.equal(ids[:, : asked.shape[1]], asked):
            ids = ids[:, asked.shape[1] :]  # a model of one stream repeats what it was asked
        return [" ".join(text.split()) for text in self.words.batch_decode(ids, skip_special_tokens=True)]
