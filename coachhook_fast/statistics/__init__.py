"""What ordinary text looks like to the edited layers: the corpus, the second moments of its keys, their cache."""
