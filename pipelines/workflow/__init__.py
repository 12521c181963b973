"""The order of the stages: the recipe's graph, what would run and why, and the run itself."""
