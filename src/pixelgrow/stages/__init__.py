"""The stages of a recipe, one module each. `pixelgrow.run` calls them in order; each works in a folder of its own.

This room joins data, models, training and files. `data.py` opens the sources, `materials.py` holds what all stages
share, `record.py` reads and writes `stage.json`.
"""
