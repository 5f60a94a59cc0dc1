"""Writes the files of the tokenizer anew."""

from data_pipeline.shapes_tokenizer import FOLDER, write

write(FOLDER)
