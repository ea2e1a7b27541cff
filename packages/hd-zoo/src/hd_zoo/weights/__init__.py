"""Weights on disk: our folders, files in several parts, and other people's checkpoints."""
