"""What :func:`fastrcnn_kernels.patch` swaps, a file a peer: ``SWAPS``, and ``KEPT`` with the reason."""
