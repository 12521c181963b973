"""The one reader of each published format: ledgers, shards, images, scores, selection, split, cache, models."""
