"""Retrace: run the ablations of a paper and compute, from recorded runs, which claims came back."""
