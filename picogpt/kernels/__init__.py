"""Native kernels in C, compiled on the machine that uses them.

`build` compiles and caches a library, without torch; `compiled` has the functions of training, and `block` their autograd.
Nothing is imported here, so that what needs no torch does not import it.
"""
