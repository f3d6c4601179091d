"""One file per paper. A model file has Config, Model, flops(), param_groups() and width_factors()."""

from recscale.models import argus, hstu, sasrec, stu

MODELS = {"argus": argus, "hstu": hstu, "sasrec": sasrec, "stu": stu}
