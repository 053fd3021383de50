"""Where training images come from: captioned folders, class folders, tar shards, mixtures of them.

`opening.py` finds out what a path is; `base.py` is what all sources are to a loader; `index.py` is what file sources
share. Imports `data.images`, `data.scenes` and the root's small modules, and knows nothing of loaders and training.
"""
