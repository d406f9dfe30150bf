"""The verbs, one a file: from an adapter to an adapter or a report."""
