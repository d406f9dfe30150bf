"""Colours on a dark and on a light ground. Both paint the ground too, so that any terminal will do."""

from __future__ import annotations

import os
from typing import Final

from textual.theme import Theme

DARK: Final = Theme(
    name="loratools-dark",
    primary="#6cb6ff",
    secondary="#8b9bb8",
    accent="#ffb454",
    warning="#ffb454",
    error="#ff7b8a",
    success="#7bd88f",
    foreground="#d5dbe8",
    background="#10141d",
    surface="#10141d",
    panel="#1b2230",
    dark=True,
    variables={
        "other": "#d2a6ff",
        "faint": "#5d6a82",
        "lost": "#6a4152",
        "border": "#39445a",
        "border-blurred": "#2a3244",
        "footer-background": "#1b2230",
        "footer-key-foreground": "#ffb454",
        "block-cursor-foreground": "#ffffff",
        "block-cursor-background": "#2b4a72",
        "block-cursor-blurred-background": "#253045",
    },
)
LIGHT: Final = Theme(
    name="loratools-light",
    primary="#0b62b8",
    secondary="#56637a",
    accent="#b35900",
    warning="#b35900",
    error="#c4283c",
    success="#1f7a3a",
    foreground="#20293a",
    background="#fbfcfe",
    surface="#fbfcfe",
    panel="#e9edf4",
    dark=False,
    variables={
        "other": "#7b3fc4",
        "faint": "#8490a5",
        "lost": "#eebcc6",
        "border": "#b4bfd0",
        "border-blurred": "#d0d7e3",
        "footer-background": "#e9edf4",
        "footer-key-foreground": "#b35900",
        "block-cursor-foreground": "#0c1a30",
        "block-cursor-background": "#bcd8f7",
        "block-cursor-blurred-background": "#dbe6f3",
    },
)


def first_theme() -> str:
    """The light one where the terminal says that its ground is light (COLORFGBG, as rxvt and Konsole set it)."""
    ground = os.environ.get("COLORFGBG", "").rpartition(";")[2]
    return (LIGHT if ground in ("7", "15") else DARK).name
