"""How weights and tokenizers are stored: a file per format, imported when a checkpoint has it."""
