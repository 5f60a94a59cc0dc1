"""Token ids on the host: tokenizer, vocabulary, prompts and answers."""
