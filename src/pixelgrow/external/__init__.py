"""Models made elsewhere: looked up in a folder or on the hub, loaded from safetensors, known by a fingerprint. Vision
networks, CLIP, LPIPS, diffusers' autoencoders.

The only room that talks to a hub. Text encoders, features and stages stand on it.
"""
