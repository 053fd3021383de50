"""Several processes, one training: what a process knows of the others, and what they tell each other.

Imports nothing of ours but errors. Everything above may use it; nothing else calls torch.distributed.
"""

from pixelgrow.distributed.shard import Shards, Split
from pixelgrow.distributed.team import Lost, Team, join

__all__ = ["Lost", "Shards", "Split", "Team", "join"]
