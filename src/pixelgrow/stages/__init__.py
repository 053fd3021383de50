"""The stages of a recipe: what each does in its folder. `pixelgrow.run` calls them in order.

Here data, models, training and files meet; `materials.py` is what stages share, `record.py` what each writes down.
"""
