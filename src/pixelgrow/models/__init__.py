"""Networks: the core, the levels around it, the UViT that they make, the discriminator; and their sizes and FLOPs.

Plain functions of tensors: no preconditioning, no data, no files. Imports nothing of ours but `errors`.
"""
