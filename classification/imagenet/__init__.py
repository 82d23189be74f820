"""ImageNet: from the downloaded archives (raw, prepare) to an LMDB (lmdb), then to batches (decode, data)."""
