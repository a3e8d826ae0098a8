"""Finished datasets in, aligned models out."""
