"""What the verbs of the command line do: each is one file."""
