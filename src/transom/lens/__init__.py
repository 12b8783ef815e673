"""Analyses: they look at a model or at what it did, and change nothing."""
