"""Questions about operators, one a file: the general rule first, then the short rule of each structure."""
