"""The steps of an answer: read with every model, fuse, decode."""
