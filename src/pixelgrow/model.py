"""A trained model with its text encoder: load it, sample images, save it, share it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pixelgrow import checkpoint
from pixelgrow.checkpoint import CheckpointConfig, identity
from pixelgrow.diffusion.denoiser import Denoiser, NoiseSchedule
from pixelgrow.diffusion.generator import Generator
from pixelgrow.diffusion.guidance import Network
from pixelgrow.diffusion.sampling import Samples, Schedule, generate, sample, slices
from pixelgrow.diffusion.sampling_spec import check_one_step
from pixelgrow.errors import UserError
from pixelgrow.external import hub
from pixelgrow.external.autoencoder import Autoencoder
from pixelgrow.models.cond import Cond
from pixelgrow.pictures import to_uint8
from pixelgrow.text.encoders import LabelEncoder, TextEncoder, as_labels, load_encoder
from pixelgrow.training import unfinished
from pixelgrow.training.unfinished import Unfinished
from pixelgrow.writing import read_json, reading

logger = logging.getLogger(__name__)
WEIGHTS = Path(__file__).parent / "weights"
RECORD = "stage.json"  # in the folder of a stage
# Sampling settings that neither the caller nor the checkpoint gives.
DEFAULTS: dict[str, Any] = {"steps": 32, "sampler": "dpm++2m", "guidance": 2.0}
Progress = Callable[[int, int], None]  # called with (steps done, steps in all)
Sampler = Callable[[Cond, Sequence[int], Progress | None], Samples]


def builtin() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(p.parent.name for p in WEIGHTS.glob("*/config.json"))


def find(name: str | Path) -> Path:
    """The checkpoint folder that a name means: a folder, a run's stage, a model of the package, or one of the hub.

    `owner/name` is looked up on the hub (or in its local cache) where no such folder exists. Raises UserError.
    """
    folder = Path(name)
    with reading(folder):
        for candidate in (folder, folder / "checkpoint", WEIGHTS / str(name)):
            if (candidate / checkpoint.CONFIG).is_file():
                return candidate
        exists = folder.exists()
    if hub.is_repository(str(name)) and not exists:
        return hub.fetch(str(name), ["*.json", "*.safetensors", "README.md"])
    known = ", ".join(builtin()) or "none"
    raise UserError(
        _of_a_run(folder)
        or f"{name} is not a checkpoint: expected a folder with {checkpoint.CONFIG}, or a built-in model ({known})"
    )


def _of_a_run(folder: Path) -> str:
    """What to name instead of the folder of a run, or of a stage without a checkpoint; "" for other folders."""
    is_stage = (folder / RECORD).is_file()
    run = folder.resolve().parent if is_stage and folder.name in ("", "..") else folder.parent if is_stage else folder
    stages = sorted(path.parent for path in run.glob(f"*/{RECORD}"))
    if not stages:
        return ""
    models = [str(stage) for stage in stages if (stage / "checkpoint" / checkpoint.CONFIG).is_file()]
    models = models or [str(stage) for stage in stages if unfinished.saved_in(stage)]
    done = is_stage and (read_json(folder / RECORD) or {}).get("done")
    what = "a run" if not is_stage else "a stage that makes no model" if done else "a stage that is not finished"
    if is_stage and not done and unfinished.saved_in(folder) is None:
        what += " and has saved no average yet"
    rest = f"name one of {', '.join(models)}" if models else "no stage beside it has a model yet"
    go_on = "" if done else ", or run its recipe again to go on"
    return f"{folder} is {what}: {rest}{go_on}"


def _unfinished(folder: Path, device: torch.device | str) -> Unfinished | None:
    """The latest saved average of a stage that is not finished; None for other folders, or if nothing was saved."""
    with reading(folder):
        record = read_json(folder / RECORD) if (folder / RECORD).is_file() else None
    if record is None or record.get("done") or "settings" not in record:
        return None
    return unfinished.latest(folder, record["settings"], device)


class Model:
    """A denoiser with its text encoder: `pixelgrow.load("tiny").sample(["a red circle"], seed=0)`."""

    def __init__(self, denoiser: Denoiser, config: CheckpointConfig) -> None:
        self.denoiser, self.config = denoiser, config
        self.origin = Path()  # the folder that it was loaded from
        self._encoder: TextEncoder | LabelEncoder | None = None
        self._autoencoder: Autoencoder | None = None
        self._prompts: set[str] = set()  # encoded so far; those that are cut were reported

    @classmethod
    def from_pretrained(cls, name: str | Path, device: torch.device | str | None = None) -> Model:
        """Load a checkpoint folder, a run's stage, a built-in model ("tiny") or a repository of the hub.

        Of a stage that is not finished, the latest average that it saved is loaded, and a warning says after how many
        images. Raises UserError.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        saved = _unfinished(Path(name), device)
        if saved is not None:
            logger.warning(
                "%s is not finished: this is its average after %s of %s images",
                name, f"{saved.images:,}", f"{saved.total:,}",
            )  # fmt: skip
        folder = Path(name) if saved else find(name)
        if saved:
            network, config = saved.model, saved.config
        elif checkpoint.read_config(folder).objective == "generate":
            network, config = checkpoint.load_generator(folder, device)
        else:
            network, config = checkpoint.load(folder, device)
        model = OneStepModel(network, config) if isinstance(network, Generator) else cls(network, config)
        model.origin = folder
        return model

    @property
    def network(self) -> Denoiser | Generator:
        """The module that a checkpoint of this model stores."""
        return self.denoiser

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def resolution(self) -> int:
        """Image side of the network, in pixels or latents."""
        return self.denoiser.resolution

    @property
    def side(self) -> int:
        """Image side in pixels."""
        return self.resolution * (1 if self.autoencoder is None else self.autoencoder.factor)

    @property
    def autoencoder(self) -> Autoencoder | None:
        """Decodes the latents that the model generates; None for a model of pixels.

        Raises UserError if it is missing, or is not the one that the model was trained with.
        """
        latent = self.config.latent
        if self._autoencoder is None and latent:
            made = Autoencoder(str(latent.get("autoencoder")), self.device)
            if latent.get("fingerprint", made.fingerprint) != made.fingerprint:
                raise UserError(
                    f"the autoencoder {made.name} is not the one that the model was trained with: got fingerprint "
                    f"{made.fingerprint}, expected {latent['fingerprint']}; restore the version used in training"
                )
            self._autoencoder = made
        return self._autoencoder

    def decode(self, images: Tensor) -> Tensor:
        """The network's images or latents (B, C, h, w) as images (B, 3, H, W) in [-1, 1]."""
        return images if self.autoencoder is None else self.autoencoder.decode(images)

    def _size(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """Size of the network's images or latents for images of `size` in pixels; its own if None. Raises UserError if
        it does not fit the network's grid."""
        if size is None:
            return self.resolution, self.resolution
        factor = 1 if self.autoencoder is None else self.autoencoder.factor
        self.denoiser.net.config.check_size(size, factor=factor)
        return size[0] // factor, size[1] // factor

    def encode(self, prompts: Sequence[str]) -> Cond:
        """Prompts (or class labels as text) as conditions on the model's device.

        Raises UserError if the checkpoint names no text encoder, or if the encoder is another than in training.
        """
        if self._encoder is None:
            self._encoder = self._load_encoder()
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._prompts]
        self._prompts.update(new)
        if (cut := self._encoder.cut(new)).captions:
            logger.warning("%s", cut.line("prompt"))
        return self._encoder.encode(list(prompts)).to(self.device)

    def _load_encoder(self) -> TextEncoder | LabelEncoder:
        text = self.config.text
        if not {"encoder", "max_tokens"} <= text.keys():
            raise UserError(
                f"the checkpoint names no text encoder: its {checkpoint.CONFIG} says text: {text}, expected encoder "
                "and max_tokens; call the denoiser itself, or add the encoder that it was trained with"
            )
        encoder = load_encoder(text["encoder"], max_tokens=text["max_tokens"], device=self.device)
        if text.get("fingerprint", encoder.fingerprint) != encoder.fingerprint:
            raise UserError(
                f"the text encoder {text['encoder']!r} is not the one that the model was trained with: got fingerprint "
                f"{encoder.fingerprint}, expected {text['fingerprint']}; restore the version used in training"
            )
        return encoder

    def sample(self, prompts: Sequence[str] | str, **settings: Any) -> list[Image.Image]:
        """An image for each prompt, all at once; `settings` and errors as in `stream`."""
        return list(self.stream(prompts, **settings))

    def preview(self, prompts: Sequence[str] | str, **settings: Any) -> list[Image.Image]:
        """A thumbnail for each prompt: what `sample` with the same settings averages down to, at lower cost.

        Its resolution is the lowest that the model is exact over, usually the core's. In a model of latents, latents
        average down; the decoded images do so only roughly. Raises UserError as `stream` does, and for a model that was
        not grown by exact rungs.
        """
        return list(self.stream(prompts, preview=True, **settings))

    def stream(
        self,
        prompts: Sequence[str] | str,
        *,
        seed: int = 0,
        index: Sequence[int] | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        size: tuple[int, int] | None = None,
        grid: str | None = None,
        interval: tuple[float, float] | None = None,
        threshold: float | None = None,
        guide_details: bool | None = None,
        guide: Network | Model | None = None,
        preview: bool = False,
        batch: int = 64,
        progress: Progress | None = None,
    ) -> Iterator[Image.Image]:
        """An image for each prompt, one after the other; see `sampling.sample` for the settings. Those left out are the
        checkpoint's own. The model's device holds one batch of images at a time.

        `size` is (h, w) in pixels; `grid` "karras" or "native" (to the training's noise, see `noise_grid`); `guide`
        another model or `model.denoiser.base`, the model before its last `preserve` growth; `interval` in sigma at the
        model's resolution. The same (seed, index, prompt, settings) give the same image at any batch size.
        `preview`: thumbnails of the lowest resolution that the model is exact over.
        A prompt for a model of classes is the name of a class, or its number. Raises UserError.
        """
        one_batch = self.sampler(
            seed=seed, size=size, guide=guide, preview=preview, batch=batch, steps=steps, guidance=guidance,
            sampler=sampler, grid=grid, interval=interval, threshold=threshold, guide_details=guide_details,
        )  # fmt: skip
        return self._images(one_batch, _listed(prompts), index, batch, progress)

    def sampler(
        self,
        *,
        seed: int = 0,
        size: tuple[int, int] | None = None,
        guide: Network | Model | None = None,
        preview: bool = False,
        batch: int = 64,
        **settings: Any,
    ) -> Sampler:
        """The function `(conditions, sample numbers, progress or None) -> Samples` that `stream` samples with.

        Settings and errors as in `stream`. Its samples are images or latents of the network: see `decode`.
        """
        settings = self.settings(**settings)
        settings["grid"] = noise_grid(settings.get("grid", "karras"), self.denoiser, self.config)
        if isinstance(guide, OneStepModel):
            raise UserError("the guide is a one-step generator, expected a multi-step model: name another")
        if isinstance(guide, Model):
            if guide.resolution != self.resolution:
                raise UserError(
                    f"the guide is a {guide.resolution} px model, expected {self.resolution} px: name an earlier or "
                    "smaller model of that resolution, or base for this one ungrown"
                )
            if identity(guide.config.text) != identity(self.config.text):
                raise UserError(
                    f"the guide's text is {_text(guide.config)}, expected {_text(self.config)}: name a model of the "
                    "same text encoder"
                )
            if identity(guide.config.latent) != identity(self.config.latent):
                raise UserError("the guide works in another latent space: name a model of the same autoencoder")
            guide = guide.denoiser
        if guide is not None and guide != self.denoiser.base and self.denoiser.exact_factors:
            logger.info("the guide is another model: sampling at full resolution throughout")
        size = self._size(size)

        def one_batch(cond: Cond, numbers: Sequence[int], progress: Progress | None) -> Samples:
            return sample(
                self.denoiser, cond, size=size, seed=seed, index=numbers, guide=guide, batch=batch, progress=progress,
                preview=preview, **settings,
            )  # fmt: skip

        return one_batch

    def _images(
        self,
        one_batch: Sampler,
        prompts: Sequence[str],
        index: Sequence[int] | None,
        batch: int,
        progress: Progress | None,
    ) -> Iterator[Image.Image]:
        """Images of prompts, encoded and sampled a batch at a time."""
        words, numbers = self._words(prompts), range(len(prompts)) if index is None else list(index)
        if len(numbers) != len(prompts):
            raise UserError(f"{len(prompts)} prompts and {len(numbers)} indices: expected an index for each prompt")
        parts = slices(len(words), batch)

        def pixels(rows: slice, note: Progress | None) -> np.ndarray:
            samples = one_batch(self.encode(words[rows]), numbers[rows], note)
            return to_uint8(self.decode(samples.images))

        def made() -> Iterator[Image.Image]:
            for part, rows in enumerate(parts):
                note = None if progress is None else _later(progress, part, len(parts))
                yield from map(Image.fromarray, pixels(rows, note))

        return made()

    def conditions(self, prompts: Sequence[str]) -> Cond:
        """Prompts as conditions on the model's device; of a model of classes, their names or numbers."""
        return self.encode(self._words(prompts))

    def _words(self, prompts: Sequence[str]) -> list[str]:
        """Prompts as the text encoder receives them: captions as they are, classes as numbers. Raises UserError."""
        head, _, count = str(self.config.text.get("encoder")).partition(":")
        if head != "labels":
            return list(prompts)
        return as_labels(prompts, self.config.text.get("classes", []), int(count))

    def settings(self, **given: Any) -> dict[str, Any]:
        """Sampling settings: those given, else the checkpoint's, else `DEFAULTS`."""
        return DEFAULTS | self.config.sampling | {k: v for k, v in given.items() if v is not None}

    def save_pretrained(self, folder: Path | str, *, dtype: torch.dtype | None = None) -> None:
        """Write the checkpoint folder, replacing a checkpoint there; UserError if it holds other files.

        `dtype`: torch.float16 or torch.bfloat16 halves the file. It is loaded as float32, whatever it was stored in.
        """
        checkpoint.save(Path(folder), self.network, self.config, dtype=dtype)

    def push_to_hub(self, repo: str, *, private: bool = False, dtype: torch.dtype | None = None) -> str:
        """Upload the checkpoint to `owner/name` on the hub, stored as `dtype`; returns its address."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi()
        url = api.create_repo(repo, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "checkpoint"
            self.save_pretrained(folder, dtype=dtype)
            api.upload_folder(repo_id=repo, folder_path=folder)
        return str(url)


def _listed(prompts: Sequence[str] | str) -> list[str]:
    """One prompt or several as a list; UserError for none."""
    listed = [prompts] if isinstance(prompts, str) else list(prompts)
    if not listed:
        raise UserError("no prompt was given: expected at least one")
    return listed


def _later(progress: Progress, part: int, parts: int) -> Progress:
    """The progress callback of one part of several, in steps of all parts."""
    return lambda done, total: progress(part * total + done, parts * total)


def _text(config: CheckpointConfig) -> str:
    """A text encoder in a few words."""
    text = config.text
    return f"{text.get('encoder')!r}, {text.get('max_tokens')} tokens, {str(text.get('fingerprint'))[:12]}"


class OneStepModel(Model):
    """A one-step generator with its text encoder: one network evaluation for each image. The only sampling setting is
    `guidance`, for a generator that is conditioned on it."""

    def __init__(self, generator: Generator, config: CheckpointConfig) -> None:
        super().__init__(generator.denoiser, config)
        self.generator = generator

    @property
    def network(self) -> Denoiser | Generator:
        return self.generator

    @property
    def resolution(self) -> int:
        return self.generator.resolution

    def stream(
        self,
        prompts: Sequence[str] | str,
        *,
        seed: int = 0,
        index: Sequence[int] | None = None,
        size: tuple[int, int] | None = None,
        preview: bool = False,
        batch: int = 64,
        progress: Progress | None = None,
        **settings: Any,
    ) -> Iterator[Image.Image]:
        """An image for each prompt, one after the other. A guided generator takes `guidance`, the checkpoint's if left
        out. Raises UserError for settings of multi-step sampling."""
        one_batch = self.sampler(seed=seed, size=size, preview=preview, batch=batch, **settings)
        return self._images(one_batch, _listed(prompts), index, batch, progress)

    def sampler(
        self,
        *,
        seed: int = 0,
        size: tuple[int, int] | None = None,
        preview: bool = False,
        batch: int = 64,
        **settings: Any,
    ) -> Sampler:
        own = self.settings(**settings)
        size = self._size(size)

        def one_batch(cond: Cond, numbers: Sequence[int], progress: Progress | None) -> Samples:
            samples = generate(
                self.generator, cond, size=size, seed=seed, index=numbers, batch=batch, preview=preview, **own
            )
            if progress is not None:
                progress(1, 1)
            return samples

        return one_batch

    def settings(self, **given: Any) -> dict[str, Any]:
        """`guidance` for a guided generator, else nothing; other settings are refused."""
        return one_step_settings(self.config, given)


def one_step_settings(config: CheckpointConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling settings of a generator: `guidance` if it is guided, as given or else the checkpoint's own.

    Raises UserError for other settings, and for an invalid weight.
    """
    own = {"guidance": config.sampling.get("guidance", DEFAULTS["guidance"])} if config.network.guided else {}
    chosen = own | {k: v for k, v in given.items() if v is not None}
    check_one_step(chosen, guided=config.network.guided)
    return {k: float(v) for k, v in chosen.items()}


def noise_grid(name: str, denoiser: Denoiser, config: CheckpointConfig) -> str | Schedule:
    """The `grid` argument of `sampling.sample` for a name: "karras", or "native" for the training's schedule.

    Raises UserError for another name, and for "native" where the checkpoint does not hold its training noise.
    """
    if name != "native":
        if name != "karras":
            raise UserError(f"grid (--schedule) {name!r} does not exist; expected 'karras' or 'native'")
        return name
    if config.noise is None:
        raise UserError(
            "grid (--schedule) 'native': the checkpoint does not hold the noise of its training; use 'karras'"
        )
    return NoiseSchedule(config.noise, denoiser)


load = Model.from_pretrained
