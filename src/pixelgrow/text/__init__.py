"""Captions to conditions: frozen encoders (T5, CLIP, MiniLM), class labels, and the cache that encodes a caption once.

Stands on `external` and on `models.cond`, the plain tensors that it fills in.
"""
