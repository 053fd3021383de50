"""Networks: the core, the levels around it, the UViT built of both, the discriminator; their sizes and FLOPs.

Plain functions of tensors: no preconditioning, no data, no files. Imports nothing of ours but `errors`.
"""
