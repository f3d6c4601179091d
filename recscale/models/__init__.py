"""One file per paper. A model file has Config, Model, flops(), param_groups() and width_factors()."""

from recscale.models import hstu, sasrec

MODELS = {"hstu": hstu, "sasrec": sasrec}
