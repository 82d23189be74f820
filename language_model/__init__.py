"""Language modelling: recurrent networks on One Billion Words, and on any other text with one sentence a line."""
