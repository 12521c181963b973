"""Stage `encode`: selected images and captions to a cache of posterior moments and text states."""
