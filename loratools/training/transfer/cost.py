"""What a transfer will take, before it starts."""

from __future__ import annotations

from typing import Final

from loratools.training.cost import Cost, Machine, if_known, n_weights
from loratools.training.distil import Train, settled
from loratools.training.models import load_tokenizer
from loratools.training.transfer.settings import Transfer

_FILLED: Final = 0.35  # of the longest inputs and answers, which is what they take on average
_MADE: Final = 2  # inputs for each that is kept


@if_known
def estimated(
    source: str, target: str, options: Transfer, *, generator: str | None = None, with_kit: bool = False
) -> Cost:
    """All stages together; None where a model is not here.

    `with_kit`: the source reads what the generator makes up, and both are in memory.
    """
    places = {"source": source, "target": target, "generator": generator or target}
    sizes = {role: n_weights(place) for role, place in places.items()}
    machine, is_taught = Machine(options.device), _is_taught(source, target, options.train)

    def held(*roles: str) -> int:
        return sum({places[role]: sizes[role] for role in roles}.values())

    most = max(
        held("generator", "source") if with_kit else held("generator"),
        held("source"),
        # the teacher is a model of its own, for the adapter is in its weights
        held("target") + (held("source") if is_taught else 0),
    )
    tokens = options.train.batch * (options.max_input_tokens + options.max_answer_tokens)
    asked, answer = _FILLED * options.max_input_tokens, _FILLED * options.max_answer_tokens
    made = _MADE * options.samples * asked
    read = options.training.n_steps(options.samples) * options.train.batch * (asked + answer)
    passes = 2 if options.weighing == "robust" else 1
    seconds = (
        machine.saying(sizes["generator"], made, options.batch)
        + (machine.reading(sizes["source"], made) if with_kit else 0.0)
        + machine.saying(sizes["source"], passes * options.samples * answer, options.batch)
        + machine.training(sizes["target"], read)
        + (machine.reading(sizes["source"], read) if is_taught else 0.0)
    )
    return Cost(machine.memory(most, sizes["target"], tokens), seconds)


def _is_taught(source: str, target: str, train: Train) -> bool:
    """Whether training asks the teacher for probabilities, so that both models are in memory."""
    if train.loss == "auto":
        train = settled(train, load_tokenizer(target), load_tokenizer(source))
    return train.loss != "ce"
