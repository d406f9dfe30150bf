"""The full-screen explorer: what it knows and decides in files without widgets, and one widget or screen a file."""
