"""Traces: questions answered by a teacher that writes, behind an OpenAI-compatible endpoint or on this machine.

- ``prompts``: questions from JSONL, their identity, and their prompts.
- ``endpoint``: one exchange over HTTP. ``reply``: checks of an answer. ``pool``: many exchanges, retries and limits.
- ``local``: a transformers model or a run folder.
- ``writer``: the output file, which a killed run leaves whole. ``scores``: log-probabilities for the token cache.
- ``pipeline``: all steps, in order.

Imports no torch by itself.
"""
