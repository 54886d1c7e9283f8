"""Text to token ids: tokenizers, chat prompts and the order of options."""
