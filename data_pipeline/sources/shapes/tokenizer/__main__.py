"""Writes the files of the tokenizer anew."""

from data_pipeline.sources.shapes.tokenizer import FOLDER, write

write(FOLDER)
