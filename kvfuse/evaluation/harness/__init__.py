"""Methods as models of lm-evaluation-harness."""
