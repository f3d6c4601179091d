"""The public datasets, by name."""

from recscale.data import amazon2014, kuairand, kuairand_watch, movielens, yelp

DATASETS = {
    **movielens.DATASETS,
    **amazon2014.DATASETS,
    **yelp.DATASETS,
    **kuairand.DATASETS,
    **kuairand_watch.DATASETS,
}
