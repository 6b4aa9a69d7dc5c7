"""The operators of the ``attnres::`` namespace and their kernels, a naive twin beside every fused one."""
