"""Train a fuser: recipe -> examples -> padded batches -> transformers' Trainer. Both models stay frozen."""
