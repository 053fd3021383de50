"""The one training loop, for every objective: optimizers, averages of the weights, exact resume, logs, hooks.

An objective says which networks train and what the loss of a batch is. The denoising objective is here (`denoise.py`);
those of one-step generators are in `onestep`. Imports no recipes, no stages and no checkpoints of models.
"""
