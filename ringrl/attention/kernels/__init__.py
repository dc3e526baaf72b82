"""Block computations under one contract (contract.py).

forward(inputs, options, start) -> Partial: attention over the keys of `inputs` and those that `start` has seen
backward(inputs, options, cotangents, dq) -> Gradients: of these keys, and of the queries through them, added to `dq`
"""
