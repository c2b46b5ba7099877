#!/bin/sh
# Writes a tar of what is to be released: the last commit, or all of an unpacked source distribution but what was built.
set -eu
if [ -e .git ]; then
  [ -z "$(git status --porcelain)" ] || echo "not committed, and so left out: $(git status --porcelain | tr '\n' ' ')" >&2
  git archive --format=tar HEAD
else
  tar -c --exclude=./build --exclude=./dist --exclude='./.venv*' --exclude='*.so' --exclude='*.egg-info' .
fi
