"""Parallel text to what training reads: the command, recipes, downloads, raw text, and the three stages."""
