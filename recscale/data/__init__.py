"""The public datasets, by name."""

from recscale.data import amazon2014, dreamrec, kuairand, kuairand_watch, microlens, movielens, yelp

DATASETS = {
    **movielens.DATASETS,
    **amazon2014.DATASETS,
    **yelp.DATASETS,
    **microlens.DATASETS,
    **kuairand.DATASETS,
    **kuairand_watch.DATASETS,
    **dreamrec.DATASETS,
}
