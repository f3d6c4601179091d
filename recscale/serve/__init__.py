"""Answers from a trained model: histories are encoded once and kept, candidates are scored against them."""
