"""Where training images come from: captioned folders, class folders, tar shards, mixtures of them.

`base.py` is what a loader sees of any source. `opening.py` opens what a recipe names, `kinds.py` finds out what it is:
`folders.py`, `metadata.py` (its rows: `tables.py`) or `tars.py`. They share `index.py` (what a scan finds), `names.py`
(rules for names), `captions.py`, `files.py` (walking and opening) and `identity.py` (fingerprints). `tars.py` scans
shards by `shards.py` into an index on the disk (`stored.py`, `keeping.py`); `streamed.py` does so with shards of other
machines (`remote.py`), which it keeps for a while (`ring.py`). `latents.py` puts an autoencoder in front of a source.
Imports `data.images`, `data.scenes`, `data.workers` and the root's small modules, nothing above.
"""
