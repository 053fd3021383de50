"""One-step generation (PaGoDA, arXiv 2405.14822): pairs of images and latents, the losses and the feature networks that
they measure with, distillation, guidance weights and their estimator.

Stands on `diffusion`, `data`, `external` and the objective of `training`; stages and editing stand on it.
"""
