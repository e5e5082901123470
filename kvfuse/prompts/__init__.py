"""A prompt, from messages to the aligned token ids of every model."""
