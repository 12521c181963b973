"""Stage `release`: a trained model as a folder that stock diffusers pipelines load, with a card."""
