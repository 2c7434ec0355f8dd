"""Data sets of pictures and tables: each reads its files into rows, and returns an :class:`~kdlab.data.ImageData`."""
