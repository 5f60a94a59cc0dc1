"""Prepared datasets on disk: ArrayRecord shards, builders and readers."""
