"""Stage `select`: which of the acquired pairs are used, and on which side of the split they are."""
