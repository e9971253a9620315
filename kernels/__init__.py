"""Attention, log-probabilities, pointwise operations and the cache of generation.

They know nothing of the rest of the project. Each states the formula that it computes, and tests/
compares its values and gradients with a naive version. To understand the method you can rely on the
formulas and skip this folder.
"""
