"""What the three training loops stand on: plain functions and small classes, no trainer, no callbacks."""
