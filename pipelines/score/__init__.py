"""Stage `score`: a column per scorer for each kept pair. Scoring drops nothing; `select` decides."""
