"""Freezing by pattern: a parameter tree parted into what is trained and what is not, and put together again.

    trainable, frozen = split(params, ("embed.*", "*norm.scale"))
    state = init_state(trainable, optimizer, frozen=frozen, ...)
    step = make_step(joined(next_token(config)), optimizer)

Frozen leaves have no gradient and no optimizer state, and a checkpoint of what is trained does not hold them.
"""

import fnmatch
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from internjax.train.losses import Loss


class Split(NamedTuple):
    """Two trees that share no leaf; together they are the tree that was split. Branches without leaves are absent."""

    trainable: dict
    frozen: dict


def split(tree: dict, patterns: Sequence[str]) -> Split:
    """Returns the leaves whose dotted path matches none of the patterns, and those that match one.

    A pattern is a glob over the whole path, as in `layers.attention.*` or `*.scale`; `*` crosses dots. Layers are
    stacked in one leaf, so they are frozen together. `tree` may be parameters or their logical axes. Raises ValueError
    for a pattern that matches nothing, and for patterns that leave nothing to train.
    """
    parts: tuple[dict, dict] = ({}, {})
    unused, paths = set(patterns), []
    for path, leaf in _leaves(tree):
        name = ".".join(path)
        matching = {pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)}
        unused -= matching
        paths.append(name)
        _put(parts[bool(matching)], path, leaf)
    if unused:
        raise ValueError(
            f"freezing by {sorted(unused)} matches no parameter; the model has {', '.join(paths)}, and a pattern "
            "matches a whole name (* stands for any part)"
        )
    if not parts[0]:
        raise ValueError(f"freezing by {tuple(patterns)} leaves nothing to train; freeze fewer of {', '.join(paths)}")
    return Split(*parts)


def join(first: dict, second: dict | None) -> dict:
    """Returns the tree that `split` parted; raises ValueError where both hold a leaf."""
    if not second:
        return first
    whole = dict(first)
    for name, child in second.items():
        if name in whole and not (isinstance(child, dict) and isinstance(whole[name], dict)):
            raise ValueError(f"both trees have a leaf {name!r}; join what split has parted")
        whole[name] = join(whole[name], child) if name in whole else child
    return whole


def joined(loss: Loss) -> Loss:
    """Returns a loss of whole parameters as one whose trainable and frozen part are those of `split`."""
    return lambda trainable, frozen, batch, rng: loss(join(trainable, frozen), None, batch, rng)


def _leaves(tree: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields the path of every leaf; whatever is no dict is one (an array, a QuantArray, axis names)."""
    for name, child in tree.items():
        if isinstance(child, dict):
            yield from _leaves(child, (*path, name))
        else:
            yield (*path, name), child


def _put(tree: dict, path: tuple[str, ...], leaf: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf
