"""Stage `evaluate`: what a trained model makes of the recipe's prompts."""
