"""One file per paper. A model file has Config, Model, flops(), param_groups() and width_factors()."""

from recscale.models import argus, dlrm, dreamrec, hstu, sasrec, stu, tiger, tiger_decoder

GENERATIVE = {"tiger": tiger, "tiger_decoder": tiger_decoder}
"""Models of semantic ids (tasks/semantic_id.py)."""

MODELS = {"argus": argus, "dlrm": dlrm, "dreamrec": dreamrec, "hstu": hstu, "sasrec": sasrec, "stu": stu} | GENERATIVE
