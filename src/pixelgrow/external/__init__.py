"""Models made elsewhere: vision networks, CLIP, LPIPS and diffusers' autoencoders.

They are found in a folder or on the hub, loaded from safetensors and identified by a fingerprint. This is the only room
that talks to the hub. Text encoders, feature networks and stages stand on it.
"""
