"""Running parts of a model for the editor: its blocks, masks, packed rows, and what a pass may take."""
