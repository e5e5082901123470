"""Caches kept on disk, and activations computed again."""
