"""Fuzzers: graphs that were changed at random must be refused, or grow and compute the same."""
