"""Recipes: YAML and overrides become one validated object; every mistake is one line.

Imports settings (of training, losses, sampling, scenes), never the code that they set, so that reading needs no torch.
"""
