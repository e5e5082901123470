"""Figures -> pictures, tables and a verdict."""
