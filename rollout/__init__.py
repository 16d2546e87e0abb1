"""Answering: prompts go in, groups of samples come out."""
