"""Numbers in English words, as the task of the trained adapters has them (num2words)."""

from __future__ import annotations

_SMALL = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def words_of(n: int) -> str:
    """479146: four hundred and seventy-nine thousand, one hundred and forty-six; below a million."""
    if n < 20:
        return _SMALL[n]
    if n < 100:
        tens, rest = divmod(n, 10)
        return _TENS[tens - 2] + (f"-{_SMALL[rest]}" if rest else "")
    if n < 1000:
        hundreds, rest = divmod(n, 100)
        return f"{_SMALL[hundreds]} hundred" + (f" and {words_of(rest)}" if rest else "")
    thousands, rest = divmod(n, 1000)
    joined = "" if not rest else f", {words_of(rest)}" if rest >= 100 else f" and {words_of(rest)}"
    return f"{words_of(thousands)} thousand{joined}"


def right_answer(prompt: str) -> str | None:
    """What should follow "Number: 45\\nWords:"; None where that holds no number below a million."""
    number = prompt.removeprefix("Number: ").removesuffix("\nWords:").strip()
    if not (number.isascii() and number.isdigit() and len(number) <= 6):
        return None
    return words_of(int(number))
