"""`ldm sample`: pictures by a model folder, a checkpoint, a recipe's release, or a registered model."""
