"""Correspondence of the modules of two networks: from pairs of leaves to pairs of the blocks around them.

A converter's key map pairs the modules that hold weights. Two blocks are the same part of the network if they contain
exactly the same pairs, so the rest follows without a second table.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from torch import nn

from minidiff.config import check

CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # have no forward of their own


def module_names(module: nn.Module) -> list[str]:
    """Return the names of all submodules that compute something, in the order of construction."""
    silent = (*CONTAINERS, nn.Identity)
    return [name for name, part in module.named_modules() if name and not isinstance(part, silent)]


def present(a: nn.Module, b: nn.Module, names: Mapping[str, str]) -> dict[str, str]:
    """Return those ``names`` (a's name -> b's) that both have: key maps also list modules that a model may lack."""
    in_a, in_b = set(module_names(a)), set(module_names(b))
    return {x: y for x, y in names.items() if x in in_a and y in in_b}


def checked(a: nn.Module, b: nn.Module, names: Mapping[str, str] | None) -> dict[str, str]:
    """Return the ``names`` of a caller after checking them; None means every name that both have.

    Raises :class:`ConfigError` for a missing one, with the nearest existing name as a suggestion.
    """
    in_a, in_b = module_names(a), module_names(b)
    if names is None:
        names = {name: name for name in in_a if name in set(in_b)}
        check(len(names) > 0, "the modules have no name in common; names={...} says which of a's is which of b's")
    check(len(names) > 0, "names is empty; it maps names of a's modules to b's")
    for side, have, wanted in (("a", in_a, names.keys()), ("b", in_b, names.values())):
        for name in wanted:
            near = difflib.get_close_matches(name, have, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            check(name in have, f"names: module {side} has no {name!r}{hint}")
    return dict(names)


def with_blocks(a: nn.Module, b: nn.Module, names: Mapping[str, str]) -> dict[str, str]:
    """Add the blocks that contain the same ``names`` (a's name -> b's, all present), without the root."""
    blocks_a = _blocks(a, {x: k for k, x in enumerate(names)})
    blocks_b = _blocks(b, {y: k for k, y in enumerate(names.values())})
    found = dict(names)
    for held, outer in blocks_a.items():
        # If one block only wraps another, the outermost of either side are paired.
        if held in blocks_b and outer not in found:
            found[outer] = blocks_b[held]
    return found


def _blocks(module: nn.Module, leaves: Mapping[str, int]) -> dict[frozenset[int], str]:
    """Map each set of leaves, by their numbers, to the outermost block that contains exactly these."""
    held: dict[str, set[int]] = {}
    for leaf, number in leaves.items():
        parts = leaf.split(".")
        for k in range(1, len(parts)):
            held.setdefault(".".join(parts[:k]), set()).add(number)
    found: dict[frozenset[int], str] = {}
    for name in module_names(module):
        if name in held and name not in leaves:
            found.setdefault(frozenset(held[name]), name)  # outer blocks come first in the order of construction
    return found
