"""The built-in data: captioned vector scenes, rendered at any resolution as a pure function of (seed, index), and the
checker, which measures from an image's pixels whether it shows what its caption says.

`source.py` is what a loader opens. Imports nothing of ours but `errors`.
"""
