"""Batches become logits, logits become text."""
