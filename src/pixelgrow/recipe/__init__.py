"""Recipes: YAML and overrides become one validated object. Every mistake is one line.

Settings of training, losses, sampling and scenes are defined in their own rooms and used here.
"""
