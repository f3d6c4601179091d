"""One file per paper. A model file has Config, Model, flops() and param_groups()."""

from recscale.models import hstu, sasrec

MODELS = {"hstu": hstu, "sasrec": sasrec}
