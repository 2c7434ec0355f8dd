"""Traces: questions answered by a teacher that writes, behind an OpenAI-compatible endpoint or on this machine.

- ``questions``: what is asked, from JSONL; its identity, its prompt.
- ``endpoint``: one exchange over HTTP. ``reply``: what is odd about the answer. ``pool``: many, with tries and limits.
- ``local``: a transformers model or a run folder.
- ``writer``: the output file, which a killed run leaves whole. ``scores``: log-probabilities for the token cache.
- ``run_pipeline``: all of it, in order.

Imports no torch by itself.
"""
