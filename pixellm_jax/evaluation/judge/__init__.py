"""The language-model judge of the MUSE protocol."""
