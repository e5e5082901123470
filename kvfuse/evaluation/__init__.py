"""Compare methods on the same questions."""
