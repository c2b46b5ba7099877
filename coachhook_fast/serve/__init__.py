"""The service: one command that serves a model, takes edits, shows them, and is safe to leave running.

    server   the process: sockets, signals, header timeouts        app       what there is, put together
    guard    who gets in, with how large a body, for how long       auth      tokens, hosts
    openai   /v1: models, completions, chat                         edits_api /edits, /inspect
    generation, rows, sampling   answers in batches, in threads     editing   edits in a thread of their own
    served   the model as others run it: one version a text         page      the page at /
    schemas, errors, limits, metrics, logs                          what the others need

Data goes one way: request -> guard -> route -> worker thread -> answer. docs/serving.md is the guide.
"""
