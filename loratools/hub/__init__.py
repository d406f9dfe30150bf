"""Many adapters at once: found, put through a recipe, listed, resumed."""
