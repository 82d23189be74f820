"""ImageNet: from the archives as people have them (raw, prepare) to an LMDB (lmdb), then to batches (decode, data)."""
