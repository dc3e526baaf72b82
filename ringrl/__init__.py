"""RingRL: long-context sequence modelling for offline reinforcement learning in JAX."""

__version__ = "0.1.0"
