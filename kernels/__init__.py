"""Hand-written forward and backward passes. They take tensors and numbers and know nothing of the
project.

Each states the plain formula that it replaces, and tests/ holds a naive twin of each, values and
gradients: whoever reads the method may take the formulas for granted and skip this folder.
"""
