"""Where training images come from: captioned folders, class folders, tar shards, mixtures of them.

`base.py` is what a loader sees of any source. `opening.py` opens what a recipe names, `kinds.py` finds out what it is:
`folders.py`, `metadata.py` (its rows: `tables.py`) or `tars.py`. They share `index.py` (the index), `names.py` (rules
for names), `captions.py`, `files.py` (walking and opening) and `identity.py` (fingerprints). `latents.py` puts an
autoencoder in front of a source. Imports `data.images`, `data.scenes` and the root's small modules, nothing above.
"""
