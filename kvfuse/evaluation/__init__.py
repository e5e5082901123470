"""Compare ways of answering on the same questions."""
