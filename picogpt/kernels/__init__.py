"""Native kernels in C, compiled on the machine that uses them.

`build` compiles and caches a library, without torch; `compiled` wraps the kernels of training, `autograd` makes them
differentiable, and `bindings` describes their C structures. Nothing is imported here, so that generation starts without torch.
"""
