"""Plans: parameters, FLOPs, memory and time of every stage of a recipe, with nothing allocated.

`shapes.py` finds each stage's network before any training; `network.py` and `onestep.py` count its cost on one device,
`layout.py` and `cluster.py` on many. The room imports `recipe` and the networks. `run` checks a recipe's shapes with
it, and the command line prints its tables.
"""
