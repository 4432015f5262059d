"""Searches for the settings of a training: what is varied, what is tried next, what is ended early, what came of it."""
