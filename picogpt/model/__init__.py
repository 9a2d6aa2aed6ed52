"""The GPT with a context roll: `gpt` is the whole model in plain torch, the other modules are its parts. Import them by name."""
