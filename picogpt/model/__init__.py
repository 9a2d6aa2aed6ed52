"""The GPT with a context roll: `gpt` is the whole model in plain torch, other modules are parts of it. Import them by name."""
