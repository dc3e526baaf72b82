"""Batches from a store: contexts of trajectories, normalisation and sharding over a mesh."""
