"""Boards: methods ranked over seeds."""
