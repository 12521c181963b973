"""Self-contained HTML pages: what they have in common, and the page of a run."""
