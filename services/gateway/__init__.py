"""The clients' door: authenticate, admit, ask the matcher, relay sealed frames. No plaintext."""
