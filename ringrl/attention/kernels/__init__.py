"""Block computations under one contract.

forward(q, k, v, visibility, options) -> (o float32, lse float32)
backward(q, k, v, visibility, options, lse, delta, do) -> (dq, dk, dv), all float32

`lse` of the backward is the *global* log-sum-exp of each query and `delta` = rowsum(o * do) - dlse, so that the
gradients of a part of the keys simply add up to the gradients of all of them.
"""
