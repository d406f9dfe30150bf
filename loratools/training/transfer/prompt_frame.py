"""What the prompts of a task have in common, and how a model is shown some so that it goes on with another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_SEPARATORS: Final = ("\n", "\n\n", "\n\n###\n\n")
_UNNAMED: Final = "Input: "  # before inputs that begin with nothing of their own


@dataclass(frozen=True)
class PromptFrame:
    """The text before and after what differs between the prompts of a task: "Number: " and "\\nWords:"."""

    before: str
    after: str

    @classmethod
    def of(cls, prompts: Sequence[str]) -> PromptFrame:
        """That of some prompts; empty where there are fewer than two different ones.

        It ends and begins where no letter or digit is cut off from its word, which few seeds may happen to share.
        """
        some = sorted(set(prompts))
        if len(some) < 2:
            return cls("", "")
        before = _common(some)
        while before and before[-1].isalnum():
            before = before[:-1]
        after = _common([p[len(before) :][::-1] for p in some])[::-1]
        while after and after[0].isalnum():
            after = after[1:]
        return cls(before, after)

    def inside(self, prompt: str) -> str:
        """What is this prompt's own; all of it where it does not have the frame."""
        if self.holds(prompt):
            return prompt[len(self.before) : len(prompt) - len(self.after)]
        return prompt

    def holds(self, prompt: str) -> bool:
        """Whether a prompt begins and ends as the others do."""
        long_enough = len(prompt) >= len(self.before) + len(self.after)
        return long_enough and prompt.startswith(self.before) and prompt.endswith(self.after)

    def said(self, text: str, *, amid: bool) -> str:
        """The input in what a model said: up to what follows every input, which may stand `amid` inputs as well.

        A full stop, say, that all seeds end with: then no more than the last one belongs to the frame.
        """
        if not self.after.strip():
            return text.strip()
        found = text.strip().removesuffix(self.after.strip()) if amid else text.partition(self.after)[0]
        return found.strip()

    def around(self, inside: str) -> str:
        """The prompt of an input."""
        return f"{self.before}{inside}{self.after}"


@dataclass(frozen=True)
class Listing:
    """How inputs of a task are told from one another in a list: what lies between two, and what ends a new one.

    Inputs of one line each make lines, which even small models continue well; longer ones are set apart.
    """

    between: str
    stop: str

    @classmethod
    def of(cls, frame: PromptFrame, prompts: Sequence[str], answers: Sequence[str] = ()) -> Listing:
        """That of all seeds, whichever of them are shown."""
        insides = [frame.inside(prompt).strip() for prompt in prompts]
        shown = _shown(frame, prompts, answers)
        between = next((s for s in _SEPARATORS if not any(s in one for one in shown)), _SEPARATORS[-1])
        return cls(between, "\n" if not any("\n" in inside for inside in insides) else between)


def few_shot(frame: PromptFrame, listing: Listing, prompts: Sequence[str], answers: Sequence[str] = ()) -> str:
    """The prompts one below the other, without what follows every input; with it and the answers where there are some.

    It ends where the next one begins, but for its last blank: tokenizers join that to the word behind it.
    """
    shown = _shown(frame, prompts, answers)
    return f"{listing.between.join(shown)}{listing.between}{_label(frame).rstrip(' ')}"


def _label(frame: PromptFrame) -> str:
    return frame.before.lstrip("\n") or _UNNAMED


def _shown(frame: PromptFrame, prompts: Sequence[str], answers: Sequence[str]) -> list[str]:
    shown = [f"{_label(frame)}{frame.inside(prompt)}" for prompt in prompts]
    if answers:
        return [f"{one}{frame.after}{answer}" for one, answer in zip(shown, answers, strict=True)]
    return shown


def _common(texts: Sequence[str]) -> str:
    """How all of them begin."""
    first, last = min(texts), max(texts)  # all others lie between them
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length]
