"""The parts of `benchmarks/growth.py`: does a grown model learn sooner than one from random weights?"""
