"""Element codecs: a matrix to a few bits for each number, and back."""
