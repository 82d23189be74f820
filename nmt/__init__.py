"""Neural machine translation: Transformer-base on WMT14 English-German, from text files to the BLEU row."""
