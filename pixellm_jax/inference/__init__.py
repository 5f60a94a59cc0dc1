"""From a request (image and question) to an answer (text and masks)."""
