"""What connects edited models to other stacks: vLLM."""
