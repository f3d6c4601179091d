"""The four axes of a study, each a function that turns a base config into the config of a cell.

An axis function copies the base, changes what its axis means and nothing else, and notes the coordinate in
`config.cell.coordinates`. `cell` then names it and says which axes it belongs to.
"""

from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from recscale.scaling import recipes


def _changed(base: ConfigDict, coordinate: str, value: float) -> ConfigDict:
    config = base.copy_and_resolve_references().unlock()
    config.cell.coordinates[coordinate] = value
    return config.lock()


def table_rows(base: ConfigDict, rows: int) -> ConfigDict:
    """Table axis: rows of the item table; fewer rows than items are shared by hashing (0: a row per item)."""
    config = _changed(base, "table_rows", rows)
    config.table.update({"kind": "hashed" if rows else "full", "rows": rows, "parts": 1})
    return config


def table_kind(
    base: ConfigDict, kind: str, rows: int = 0, parts: int = 1, inner: int = 0, combine: str = "sum"
) -> ConfigDict:
    """Table axis: how an id becomes a vector (recscale/layers/kinds.py) and the sizes of that kind."""
    config = base.copy_and_resolve_references().unlock()
    sizes = {"kind": kind, "rows": rows, "parts": parts, "inner": inner, "combine": combine}
    config.table.update(sizes)
    config.cell.coordinates.update(sizes)
    return config.lock()


def table_dim(base: ConfigDict, dim: int) -> ConfigDict:
    """Table axis: width of the item vectors, the encoder's width unchanged."""
    config = _changed(base, "table_dim", dim)
    config.model.embed_dim = dim
    return config


def data_users(base: ConfigDict, users: int) -> ConfigDict:
    """Data axis: training users (nested: fewer users are a part of more users)."""
    config = _changed(base, "users", users)
    config.data.users = users
    return config


def data_events(base: ConfigDict, events: int) -> ConfigDict:
    """Data axis: the last `events` events of every training user."""
    config = _changed(base, "events_per_user", events)
    config.data.events_per_user = events
    return config


def context_history(base: ConfigDict, length: int) -> ConfigDict:
    """Context axis: events of history the model sees, in training and in evaluation; at most model.max_length."""
    if length > base.model.max_length:
        raise ValueError(
            f"a history of {length} events does not fit model.max_length = {base.model.max_length}: raise the base's"
        )
    config = _changed(base, "history", length)
    config.loader.length = length
    return config


def context_features(base: ConfigDict, names: Sequence[str]) -> ConfigDict:
    """Context axis: query-context columns the model sees (none: an empty sequence)."""
    config = _changed(base, "context_features", len(names))
    config.loader.queries = tuple(names)
    return config


def encoder_width(base: ConfigDict, width: int) -> ConfigDict:
    """Encoder axis: width, with heads by recipe; the item vectors keep their width.

    The learning rate follows the square root rule, under width transfer it stays what it is.
    """
    config = _changed(base, "width", width)
    if base.optim.parametrisation == "sp":
        config.optim.learning_rate = recipes.learning_rate(base.optim.learning_rate, base.model.width, width)
    config.model.width = width
    config.model.heads = recipes.heads(width)
    if width % config.model.heads:
        raise ValueError(f"width {width} does not divide into {config.model.heads} heads: choose a multiple of them")
    if "ffn" in config.model:
        config.model.ffn = base.model.ffn * width // base.model.width
    if "qk_dim" in config.model:
        config.model.qk_dim = config.model.v_dim = width // config.model.heads
    return config


def encoder_depth(base: ConfigDict, depth: int) -> ConfigDict:
    """Encoder axis: layers."""
    config = _changed(base, "depth", depth)
    config.model.depth = depth
    return config


def encoder_size(base: ConfigDict, size: str) -> ConfigDict:
    """Encoder axis: one dial for depth and width together, the sizes of ARGUS (scaling/recipes.py)."""
    config = recipes.argus(base, size).unlock()
    config.cell.coordinates.update({"width": config.model.width, "depth": config.model.depth})
    return config.lock()


def semantic_id_codes(base: ConfigDict, codes: str, levels: int, codebook: int, digits: int = 0) -> ConfigDict:
    """Semantic-id axis: the codes of the items, `levels` learned ones of `codebook` each, in the folder `codes`.

    digits: size of one further level that tells items of the same tuple apart, 0 without one. The model's vocabulary
    has one size for all levels: the larger of the two.
    """
    config = base.copy_and_resolve_references().unlock()
    config.cell.coordinates.update({"id_levels": levels, "id_codebook": codebook})
    config.table.codes = codes
    config.model.update({"levels": levels + (digits > 0), "codebook": max(codebook, digits)})
    return config.lock()


def semantic_id_width(base: ConfigDict, width: int) -> ConfigDict:
    """Encoder axis of a generative model: its width, heads of the same size, feed-forward in proportion.

    The learning rate follows the square root rule.
    """
    was, head = base.model.embed_dim, base.model.head_dim
    if width % head:
        raise ValueError(f"width {width} does not divide into heads of {head}: choose a multiple of it")
    config = _changed(base, "width", width)
    config.optim.learning_rate = recipes.learning_rate(base.optim.learning_rate, was, width)
    config.model.update({"embed_dim": width, "heads": width // head, "ffn": base.model.ffn * width // was})
    return config


def diffusion_steps(base: ConfigDict, steps: int) -> ConfigDict:
    """Diffusion axis: steps of the chain that is trained; the sampler takes all of them where it did in the base."""
    config = _changed(base, "diffusion_steps", steps)
    config.task.steps = steps
    config.task.sampling_steps = min(base.task.sampling_steps, steps)
    return config


def diffusion_sampling(base: ConfigDict, sampler: str, steps: int) -> ConfigDict:
    """Diffusion axis: the sampler and its steps; training is the base's."""
    config = _changed(base, "sampling_steps", steps)
    config.task.update({"sampler": sampler, "sampling_steps": steps})
    return config


def diffusion_guidance(base: ConfigDict, weight: float) -> ConfigDict:
    """Diffusion axis: weight of the classifier-free guidance; training is the base's."""
    config = _changed(base, "guidance", weight)
    config.task.guidance = weight
    return config


def denoiser_width(base: ConfigDict, width: int) -> ConfigDict:
    """Encoder axis of a diffusion recommender: width and feed-forward of its denoiser, heads of the same size."""
    config = _changed(base, "denoiser_width", width)
    was = base.task.width
    if width * base.task.heads % was:
        raise ValueError(f"width {width} does not divide into heads of {was // base.task.heads}: choose a multiple")
    config.task.update({"width": width, "ffn": base.task.ffn * width // was, "heads": base.task.heads * width // was})
    return config


AXES: dict[str, dict[str, Callable[..., ConfigDict]]] = {
    "table": {"rows": table_rows, "dim": table_dim, "kind": table_kind},
    "data": {"users": data_users, "events": data_events},
    "context": {"history": context_history, "features": context_features},
    "encoder": {"width": encoder_width, "depth": encoder_depth, "size": encoder_size},
}
SEMANTIC_ID: dict[str, Callable[..., ConfigDict]] = {"codes": semantic_id_codes, "width": semantic_id_width}
"""A fifth axis, "semantic_id", of models that generate: codes of the items in place of an item table."""
DIFFUSION: dict[str, Callable[..., ConfigDict]] = {
    "steps": diffusion_steps,
    "sampling": diffusion_sampling,
    "guidance": diffusion_guidance,
    "width": denoiser_width,
}
"""The axis "diffusion" of models that denoise; "width" belongs to the encoder."""


def cell(config: ConfigDict, study: str, name: str, axes: Sequence[str], seed: int = 0) -> ConfigDict:
    """The config as a named cell of a study that belongs to `axes`; raises ValueError for an unknown axis."""
    known = (*AXES, "semantic_id", "diffusion")
    unknown = set(axes) - set(known)
    if unknown:
        raise ValueError(f"cell {name!r}: unknown axes {sorted(unknown)}, expected some of {known}")
    config = config.copy_and_resolve_references()
    config.study, config.seed = study, seed
    config.cell.name, config.cell.axes = name, tuple(axes)
    return config
