"""Frozen records of numbers; `to_dict()` is the JSON that the command line prints."""
