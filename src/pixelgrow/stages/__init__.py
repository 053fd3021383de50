"""The stages of a recipe: what each does in its folder. `pixelgrow.run` calls them in order."""
