"""Turns parallel text into what training reads."""
