"""One file per paper. A model file has Config, Model, flops(), param_groups() and width_factors()."""

from recscale.models import argus, hstu, sasrec, stu, tiger

GENERATIVE = {"tiger": tiger}
"""Models of semantic ids (tasks/semantic_id.py)."""

MODELS = {"argus": argus, "hstu": hstu, "sasrec": sasrec, "stu": stu} | GENERATIVE
