"""Where the pipeline runs: storage, cluster, tracking, training engine, logs. Knows nothing of recipes or models."""
