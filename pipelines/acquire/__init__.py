"""Stage `acquire`: lists of image URLs with captions to WebDataset shards, with a ledger row for every URL."""
