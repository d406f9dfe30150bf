"""What can be known of a step to be wrong before any adapter is read: it would be wrong for all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final, get_args

from loratools.errors import UsageError

_SIZE: Final = 1 << 50  # of an adapter that no rule is too much for
# What an option of this annotation may be, and what to give: a size or a name may look like a number.
_KINDS: Final[Mapping[str, tuple[tuple[type, ...], str]]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "str": ((str, int, float), "a word"),
    "bool": ((bool,), "true or false"),
}


def check_step(verb: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """UsageError where the options of a step are missing, of another kind than `function` takes, or out of range."""
    known = inspect.signature(function).parameters
    for name, value in options.items():
        kinds, wanted = _KINDS[str(known[name].annotation).partition(" |")[0]]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise UsageError(f"{verb}: {name} is {value!r}; give {wanted}")
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name != "worked" and name not in options:
            raise UsageError(f"{verb}: {name} is missing; write for example {verb} {name}={_EXAMPLES[name]}")
    given = {name: options.get(name, parameter.default) for name, parameter in known.items() if name != "worked"}
    try:
        _CHECKS[verb](given)
    except UsageError as error:
        raise UsageError(f"{verb}: {str(error).removeprefix(f'{verb}: ')}") from None


def _squeeze(given: Mapping[str, Any]) -> None:
    from loratools.ranks import Limits

    _rank_choice(given, "rank", "energy", "budget", "ratio", "threshold", "elbow").policy(_SIZE)
    Limits(given["min_rank"], given["max_rank"], given["multiple_of"], given["uniform"])


def _truncate(given: Mapping[str, Any]) -> None:
    from loratools.ranks import Fixed

    Fixed(given["rank"])
    if given["nested"] not in ("keep", "dylora", "matryoshka"):
        raise UsageError(f"nested={given['nested']}: there are keep, dylora and matryoshka")


def _convert(given: Mapping[str, Any]) -> None:
    from loratools.formats import writable_formats
    from loratools.ops.convert import DROPPABLE

    if given["to"] not in writable_formats():
        raise UsageError(f"cannot write {given['to']!r}; there are {', '.join(writable_formats())}")
    kinds = {kind for kind in str(given["drop"]).split(",") if kind}
    if unknown := sorted(kinds - set(DROPPABLE)):
        raise UsageError(f"drop={unknown[0]}: what can be dropped is {', '.join(DROPPABLE)}")


def _reparameterize(given: Mapping[str, Any]) -> None:
    from loratools.families import fittable
    from loratools.ops.reparameterize import Reparameterize
    from loratools.sizes import parse_size

    fittable(str(given["to"]))
    budget = None if given["budget"] is None else parse_size(str(given["budget"]))
    Reparameterize(budget=budget, dtype=given["dtype"])


def _quantize(given: Mapping[str, Any]) -> None:
    from loratools.ops.quantize import Method, Quantize

    if sum(given[name] is not None for name in ("bits", "budget", "ratio")) != 1:
        raise UsageError("give one of bits, budget and ratio")
    methods = get_args(Method)
    if given["method"] not in methods:
        raise UsageError(f"method={given['method']}: there are {', '.join(methods)}")
    size = None if given["bits"] is not None else _rank_choice(given, "budget", "ratio").bytes(_SIZE)
    Quantize(
        given["method"], 4 if given["bits"] is None else given["bits"], size, given["group"], rounds=given["rounds"]
    )


def _rank_choice(given: Mapping[str, Any], *names: str) -> Any:
    from loratools.rank_choice import RankChoice

    chosen = {name: given[name] for name in names}
    if chosen.get("budget") is not None:
        chosen["budget"] = str(chosen["budget"])
    found = sum(value is not None and value is not False for value in chosen.values())
    if found != 1:
        raise UsageError(f"give one of {', '.join(names)}")
    return RankChoice(**chosen)


_EXAMPLES: Final = {"rank": "8", "to": "peft"}
_CHECKS: Final[Mapping[str, Callable[[Mapping[str, Any]], None]]] = {
    "squeeze": _squeeze,
    "truncate": _truncate,
    "convert": _convert,
    "reparameterize": _reparameterize,
    "quantize": _quantize,
}
