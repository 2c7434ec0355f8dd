"""Distances between what two networks answer: their logits and the probabilities behind them."""
