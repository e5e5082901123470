"""Rows of any shape -> encoded examples."""
