"""The public datasets, by name."""

from recscale.data import amazon2014, kuairand, movielens

DATASETS = {**movielens.DATASETS, **amazon2014.DATASETS, **kuairand.DATASETS}
