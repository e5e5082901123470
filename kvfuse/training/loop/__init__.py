"""Batches, loss and transformers' Trainer."""
