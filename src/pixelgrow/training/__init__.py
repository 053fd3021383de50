"""The one training loop, for every objective: optimizers, averages of the weights, exact resume, logs, hooks.

An objective says which networks train and what the loss of a batch is; it comes from `diffusion` (`denoise.py`) or from
`onestep`. Knows nothing of recipes, stages and checkpoints of models.
"""
