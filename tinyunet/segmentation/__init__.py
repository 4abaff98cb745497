"""Checkpoints, predictions for volumes of any size, and scores."""
