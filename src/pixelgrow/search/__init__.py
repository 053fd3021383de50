"""Search at thumbnail cost: many previews of a prompt, a judge that chooses, and only the winner sampled at full size.

Stands on `model`, on the scenes' checker and on `external`. It needs an exact model, whose preview is what the image
averages down to: the verdict on the preview is the verdict on the averaged result.
"""

from pixelgrow.search.best import Winner, best_of
from pixelgrow.search.judges import Judge, judge_named

__all__ = ["Judge", "Winner", "best_of", "judge_named"]
