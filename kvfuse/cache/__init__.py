"""KV-caches as tensors, and transformers' caches that hold them."""
