"""Floor 4: the command line. Nothing here imports torch before an experiment starts."""
