"""The stages that turn lists of image-text URLs into a released model, the workflow that joins them, the command line."""
