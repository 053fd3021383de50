"""How good generated images are, in numbers that others can check.

Stands on everything that samples; the `evaluate` stage and the command line stand on it. Images come as uint8
(B, 3, h, w), in batches: what is judged is the 8-bit file, and nothing holds all images. The mathematics takes features
and knows no network.
"""
