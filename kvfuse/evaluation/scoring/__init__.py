"""Replies -> right or wrong -> figures with intervals."""
