"""The paper's questions, each one command: ``kvfuse analyze NAME``, one file a question."""
