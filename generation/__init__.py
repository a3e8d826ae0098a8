"""Prompts in, candidate responses out."""
