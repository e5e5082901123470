"""Faster ways to compute the same on some hardware."""
