"""What a recipe will cost: parameters, FLOPs, memory and time of every stage, with nothing allocated.

`shapes.py` knows each stage's network before anything is trained; `network.py` and `onestep.py` count what one costs.
Stands on `recipe` and the networks; `run` checks a recipe's shapes with it, the command line prints its tables.
"""
