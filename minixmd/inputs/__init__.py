"""From clips on disk to what the models take: decoding, log-mel frames, video patches, token ids, batches."""
