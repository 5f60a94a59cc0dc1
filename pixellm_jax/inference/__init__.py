"""Inference: a request (image and question) -> a completion (ids) -> an answer (text, masks)."""
