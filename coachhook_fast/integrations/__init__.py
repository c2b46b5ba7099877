"""What connects edited models to other stacks: transformers, vLLM."""
