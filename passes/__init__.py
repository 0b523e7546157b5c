"""Rewrites that every host shares. A pass is a function `(Graph, ...) -> number of edits`, one a file."""
