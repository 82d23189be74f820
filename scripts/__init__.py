"""Commands around the training tasks: one shell script per table row, and what they are made of."""
