"""Comparisons of extraction methods, the order head, ``oar orders``."""
