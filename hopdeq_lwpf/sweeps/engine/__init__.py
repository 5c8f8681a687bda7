"""Runs trials, each once, whatever is killed; knows nothing of what they are."""
