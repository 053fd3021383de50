"""Denoisers and one-step generators (a network with its preconditioning), the distribution of sigma, loss weights,
guidance, samplers and their inversion, and the held-out error.

Imports `models`; nothing of data, training, text encoders or files.
"""
