"""Candidates in, judgments and rankings out."""
