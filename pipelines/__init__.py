"""The stages that turn lists of image-text URLs into a released model, their workflow, the command line."""
