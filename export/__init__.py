"""Checkpoint to bundle: trace, write the precision into the graph, verify."""
