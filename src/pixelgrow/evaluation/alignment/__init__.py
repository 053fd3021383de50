"""Does an image show what its prompt says? Questions to the scenes' checker, a VQA model or a detector; retrieval.

Every judge looks at one image of one prompt and returns a `Judged`; `summarise` turns those into means with intervals
over prompts. Nothing is trained or sampled here.
"""
