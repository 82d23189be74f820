"""Neural machine translation: Transformer-base on WMT14 English-German, from the text files to the BLEU row."""
