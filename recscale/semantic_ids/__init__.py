"""Semantic ids: item content to vectors, vectors to a few codes per item, and the folder that keeps the codes."""
