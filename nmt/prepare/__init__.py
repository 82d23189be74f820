"""Turns parallel text into what training reads: command, recipes, downloads, raw text and the three stages."""
