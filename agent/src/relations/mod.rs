//! Graph, matrix, tree, start order and groups. Pure.
