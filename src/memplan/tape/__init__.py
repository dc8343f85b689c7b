"""Symbolic tensors, autograd and dispatch."""
