"""From requests to edits: the editor, and each step of a batch in a file of its own."""
