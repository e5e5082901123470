"""Less memory and time: precomputed caches on disk, activation recomputation."""
