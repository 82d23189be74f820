"""Language modelling: recurrent networks on One Billion Words, or on any other text with one sentence per line."""
