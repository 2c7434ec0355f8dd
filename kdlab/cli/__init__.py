"""The command line. Nothing here imports torch before an experiment starts."""
