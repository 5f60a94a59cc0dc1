"""Benchmarks: metrics, records and runs."""
